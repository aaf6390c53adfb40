# Commands for trying and developing the project. PYTHON may be any Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-flow demo-video gpu test test-slow quality style assets emoji-assets video-assets gradient-quality clean

$(VENV)/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	rm -rf demo-output
	$(BIN)/python -m accelerate.commands.launch --num_processes 1 \
		--num_machines 1 --mixed_precision no --dynamo_backend no train_rlr_sd.py \
		--pretrained_model_name_or_path assets/tiny-emoji \
		--prompts assets/emoji.txt \
		--reward aesthetic --reward_path aesthetic=assets/tiny-emoji-rewards \
		--heldout_reward assets/tiny-emoji-rewards/emoji_classifier.py:ConceptAccuracy \
		--heldout_steps 10 --num_heldout_images 64 --feature_model assets/tiny-emoji-rewards/clip \
		--num_inference_steps 20 --guidance_scale 4.5 \
		--train_batch_size 16 --decode_batch_size 16 --learning_rate 2e-3 \
		--max_train_steps 40 --num_eval_images 128 --seed 0 \
		--output_dir demo-output

demo-flow: $(VENV)/installed
	rm -rf demo-flow-output
	$(BIN)/python -m accelerate.commands.launch --num_processes 1 \
		--num_machines 1 --mixed_precision no --dynamo_backend no train_rlr_flow.py \
		--pretrained_model_name_or_path assets/tiny-emoji-sd3 \
		--prompts assets/emoji.txt \
		--reward aesthetic --reward_path aesthetic=assets/tiny-emoji-rewards \
		--heldout_reward assets/tiny-emoji-rewards/emoji_classifier.py:ConceptAccuracy \
		--heldout_steps 10 --num_heldout_images 64 --feature_model assets/tiny-emoji-rewards/clip \
		--num_inference_steps 20 --guidance_scale 4.5 --max_sequence_length 1 \
		--train_batch_size 16 --decode_batch_size 16 --learning_rate 1e-3 \
		--max_train_steps 40 --num_eval_images 128 --seed 0 \
		--output_dir demo-flow-output

demo-video: $(VENV)/installed
	rm -rf demo-video-output
	$(BIN)/python -m accelerate.commands.launch --num_processes 1 \
		--num_machines 1 --mixed_precision no --dynamo_backend no train_rlr_video.py \
		--pretrained_model_name_or_path assets/tiny-wan \
		--prompts assets/videos.txt --height 32 --width 32 --num_frames 9 \
		--reward motion --heldout_reward assets/tiny-wan-rewards/video_reader.py:DigitAccuracy \
		--heldout_steps 10 --num_heldout_images 64 --feature_model assets/tiny-aesthetic/clip \
		--num_inference_steps 10 --guidance_scale 3 --max_sequence_length 16 \
		--train_batch_size 16 --gradient_accumulation_steps 1 --decode_batch_size 16 --learning_rate 1e-3 \
		--max_train_steps 20 --num_eval_images 128 --seed 0 \
		--output_dir demo-video-output

# On a machine with an NVIDIA GPU, at most nine minutes.
gpu: $(VENV)/installed-dev
	$(BIN)/python benchmarks/gpu.py

# Two processes of one thread each, see tests/conftest.py.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: $(VENV)/installed-dev
	RUN_SLOW=1 $(BIN)/python -m pytest -k "killed_at_any_moment and 20"

quality: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

assets: $(VENV)/installed-dev
	PYTHONPATH=. $(BIN)/python tools/make_tiny_assets.py

emoji-assets: $(VENV)/installed-dev
	PYTHONPATH=. $(BIN)/python tools/make_emoji_assets.py

video-assets: $(VENV)/installed-dev
	PYTHONPATH=. $(BIN)/python tools/make_video_assets.py

gradient-quality: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gradient_quality.py

clean:
	rm -rf $(VENV) demo-output demo-flow-output demo-video-output
