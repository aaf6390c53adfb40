# Copyright 2026 The RLR Team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The steps between levels of noise: DDIM with eta for any of them, and Flow-SDE.

At a level a sample is x = alpha x_0 + sigma epsilon. Diffusion models have alpha^2 + sigma^2 = 1, flow-matching models
alpha = 1 - sigma. What the network predicts is a sum of x_0 and epsilon, so both follow from x and the prediction.
"""

import math

from .chain import AffineStep


# {prediction type: e as (weight of x_0, weight of epsilon), for a level (alpha, sigma)}
PREDICTIONS = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "sample": lambda alpha, sigma: (1.0, 0.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow_prediction": lambda alpha, sigma: (-1.0, 1.0),
}


def ddim_steps(levels, prediction_type, eta=1.0, final_noise=0.0):
    r"""The `AffineStep` from each level of noise to the next, by DDIM (equation 16 of huggingface.co/papers/2010.02502).

    From a level $(\alpha, \sigma)$ to the next $(\alpha', \sigma')$, with the $\hat x_0$ and $\hat\epsilon$ of the prediction,

        x' = \alpha' \hat x_0 + \sqrt{\max(0, \sigma'^2 - s^2)} \hat\epsilon + s z
        s  = \max(\eta (\sigma' / \sigma) \sqrt{\sigma^2 - (\alpha / \alpha')^2 \sigma'^2}, \eta f)

    where f is `final_noise`. For a flow, eta = 1 is first-order SDE-DPM-Solver++ and eta = 0 is Euler's method.

    Args:
        levels: T + 1 pairs (alpha, sigma), the first executed first, with a falling sigma / alpha.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction" (epsilon - x_0).
        eta: 0 for the deterministic chain, up to 1 for the noise that keeps the distribution.
        final_noise: the least noise of a step at eta = 1; it remains in the image after a last level of sigma = 0.

    Raises:
        ValueError: for an unknown prediction type, for levels between which noise does not fall, and where the prediction does
            not say x_0: noise prediction at alpha = 0, prediction of x_0 at sigma = 0.
    """
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"unknown prediction_type {prediction_type!r}, known are: {', '.join(PREDICTIONS)}")
    steps = []
    for i, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(zip(levels, levels[1:])):
        where = f"step {len(levels) - 1 - i} from the end"
        if alpha * next_sigma >= next_alpha * sigma:
            raise ValueError(f"{where} does not lower the noise")
        of_x_0, of_epsilon = PREDICTIONS[prediction_type](alpha, sigma)
        determinant = alpha * of_epsilon - sigma * of_x_0
        if abs(determinant) < 1e-8:
            raise ValueError(
                f"prediction_type {prediction_type!r}, {where}: at alpha {alpha:g} and sigma {sigma:g} it does not say what"
                " x_0 is"
            )
        x_0, epsilon = (
            [share / determinant for share in shares] for shares in ((of_epsilon, -sigma), (-of_x_0, alpha))
        )  # as shares of x and of the prediction
        kept = math.sqrt(max(0.0, sigma**2 - (alpha / next_alpha * next_sigma) ** 2))
        noise = max(eta * next_sigma / sigma * kept, eta * final_noise)
        direction = math.sqrt(max(0.0, next_sigma**2 - noise**2))
        mean = [next_alpha * a + direction * b for a, b in zip(x_0, epsilon)]
        steps.append(AffineStep(*mean, noise, *x_0, input_scale=1.0))
    return steps


def flow_sde_steps(sigmas, noise_level=0.7):
    r"""The `AffineStep` of Flow-SDE between the levels of a flow (huggingface.co/papers/2505.05470), for comparison.

    With $dt = \sigma' - \sigma < 0$ and $g^2 = a^2 \sigma / (1 - \sigma)$, where a is the noise level and the second level
    stands for $\sigma = 1$ in the denominator,

        x' = x + (v + g^2 / (2 \sigma) (x + (1 - \sigma) v)) dt + g \sqrt{-dt} z

    Unlike DDIM's, its samples keep too much noise in few steps, at the last step too.

    Args:
        sigmas: T + 1 levels from 1 or less down to 0; the network predicts v = epsilon - x_0.
        noise_level: a, 0 for Euler's method.

    Raises:
        ValueError: for levels that do not fall.
    """
    steps = []
    for i, (sigma, next_sigma) in enumerate(zip(sigmas, sigmas[1:])):
        if next_sigma >= sigma:
            raise ValueError(f"step {len(sigmas) - 1 - i} from the end does not lower the noise")
        variance = noise_level**2 * sigma / (1 - (sigma if sigma < 1 else next_sigma))
        dt, pull = next_sigma - sigma, variance / (2 * sigma)
        steps.append(
            AffineStep(
                x_from_x=1 + pull * dt,
                x_from_e=(1 + pull * (1 - sigma)) * dt,
                sigma=math.sqrt(-variance * dt),
                x0_from_x=1.0,
                x0_from_e=-sigma,
                input_scale=1.0,
            )
        )
    return steps
