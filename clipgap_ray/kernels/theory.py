"""The linear theory of a spurious background (paper 2403.11497, section 6 and appendix D; counteranimal.md 5).

y = +-1 is the class, a the background, a = y with probability p. Latents z = (z_inv, z_spu) with
z_inv ~ N(y, sigma_inv^2) and z_spu ~ N(mu a, sigma_spu^2); image and caption are orthonormal embeddings of z with
noise. Linear encoders under the linearised contrastive loss end at W_I' W_T ~ D_I C D_T' with the latents' cross moment

    C = [[1 + sigma_inv^2, c], [c, mu^2 + sigma_spu^2]],   c = mu (2p - 1),

so that zero-shot with a prompt q (latent) scores y by y * z'C q. This is the form derived for general mu; the paper's
proof mixes mu = 1 and general mu and prints too small an error for mu > 1 (counteranimal.md 5, "Check").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr

Prompt = Literal["object", "full"]


@dataclass(frozen=True)
class Shortcut:
    """A world with a background that goes with the class.

    Attributes:
        mu: Strength of the background, relative to the object's 1.
        p: Share of training samples whose background agrees with the class, 0.5 to 1.
        sigma_inv: Noise of the object.
        sigma_spu: Noise of the background.
    """

    mu: float
    p: float
    sigma_inv: float = 1.0
    sigma_spu: float = 0.5

    @property
    def correlation(self) -> float:
        """c = E[z_inv z_spu] = mu (2p - 1)."""
        return self.mu * (2 * self.p - 1)

    def prompt(self, kind: Prompt) -> np.ndarray:
        """Return the (2,) latent of the prompt for y = 1: the object alone, or E[z | y] with its usual background."""
        return np.array([1.0, 0.0 if kind == "object" else self.correlation])


def counter_error(world: Shortcut, prompt: Prompt = "object") -> float:
    """Return the error on samples whose background contradicts the class, in the limit of many samples.

    For the object prompt Err(a != y) = Phi(m / s) with m = mu c - (1 + sigma_inv^2) and
    s^2 = (1 + sigma_inv^2)^2 sigma_inv^2 + c^2 sigma_spu^2: more than half are wrong once
    mu^2 (2p - 1) > 1 + sigma_inv^2.
    """
    c = world.correlation
    moment = np.array([[1 + world.sigma_inv**2, c], [c, world.mu**2 + world.sigma_spu**2]])
    weight = moment @ world.prompt(prompt)
    mean = weight @ np.array([1.0, -world.mu])
    spread = np.hypot(weight[0] * world.sigma_inv, weight[1] * world.sigma_spu)
    return float(ndtr(-mean / spread))


def simulate_counter_error(
    world: Shortcut, rng: np.random.Generator, prompt: Prompt = "object", num_train: int = 4000, num_test: int = 20_000,
    dim: int = 64, noise: float = 0.1,
) -> float:  # fmt: skip
    """Train on sampled image-caption pairs and return the error on sampled contradicting images.

    The minimiser of the linearised contrastive loss with ridge is the centred cross moment of images and captions (the
    sum over pairs of score differences, Xue et al. 2023), up to a factor that zero-shot does not see.

    Args:
        world: The world.
        rng: Source of randomness.
        prompt: Which prompt.
        num_train: Training pairs.
        num_test: Test images, all with a != y.
        dim: Dimension of images and captions.
        noise: Total standard deviation of the noise that each modality adds.
    """
    maps = [np.linalg.qr(rng.normal(size=(dim, 2)))[0] for _ in range(2)]

    def observe(latents: np.ndarray, into: np.ndarray) -> np.ndarray:
        return latents @ into.T + noise / np.sqrt(dim) * rng.normal(size=(len(latents), dim))

    labels = rng.choice([-1.0, 1.0], num_train)
    latents = _latents(world, labels, np.where(rng.random(num_train) < world.p, labels, -labels), rng)
    images, captions = (observe(latents, into) for into in maps)
    product = (images - images.mean(axis=0)).T @ (captions - captions.mean(axis=0)) / num_train
    labels = rng.choice([-1.0, 1.0], num_test)
    images = observe(_latents(world, labels, -labels, rng), maps[0])
    scores = images @ product @ (maps[1] @ world.prompt(prompt))
    return float((scores * labels < 0).mean())


def _latents(world: Shortcut, labels: np.ndarray, backgrounds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    centre = np.stack([labels, world.mu * backgrounds], axis=1)
    return centre + rng.normal(size=centre.shape) * [world.sigma_inv, world.sigma_spu]
