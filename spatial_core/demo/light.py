"""Weather, hour and camera of one drive along a street: what changes between the pictures of one building."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spatial_core.demo.camera import Vector
from spatial_core.demo.styles import RGB

Gains = tuple[float, float, float]


@dataclass(frozen=True)
class Light:
    """Everything about a drive that shows in its pictures.

    Args:
        sun: unit vector towards the sun.
        direct: strength of sunlight on a wall that faces the sun, relative to the sky's; 0 when overcast.
        ambient: light of the sky, per channel.
        zenith, horizon: colours of the sky.
        cloud: share of the sky under cloud.
        dusk: lamps and windows are lit.
        season: 0 spring, 1 summer, 2 autumn, 3 winter.
        gains: white balance and exposure of the camera, per channel.
        gamma: tone curve of the camera.
        haze: how fast far things fade into the horizon, per metre.
        blur_px: camera blur, pixels.
        noise: standard deviation of the sensor noise, grey levels.
        quality: JPEG quality.
    """

    sun: Vector
    direct: float
    ambient: Gains
    zenith: RGB
    horizon: RGB
    cloud: float
    dusk: bool
    season: int
    gains: Gains
    gamma: float
    haze: float
    blur_px: float
    noise: float
    quality: int

    def on_wall(self, normal: Vector) -> Gains:
        """Light per channel on a wall in the sun."""
        facing = max(0.0, sum(a * b for a, b in zip(normal, self.sun, strict=True)))
        warm = (1.0, 0.96, 0.88)
        r, g, b = (sky + self.direct * facing * tint for sky, tint in zip(self.ambient, warm, strict=True))
        return r, g, b


def draw_light(season: int, rng: np.random.Generator) -> Light:
    """The light of one drive through one street, in a season."""
    kind = float(rng.random())
    dusk, overcast = kind > 0.9, kind < 0.38
    azimuth = math.radians(float(rng.uniform(80, 280)))
    elevation = math.radians(float(rng.uniform(18, 58) if season in (0, 1) else rng.uniform(10, 34)))
    sun = (
        math.sin(azimuth) * math.cos(elevation),
        math.cos(azimuth) * math.cos(elevation),
        math.sin(elevation),
    )
    if dusk:
        ambient, zenith, horizon, direct = (0.44, 0.46, 0.58), (52, 62, 98), (196, 140, 112), 0.0
    elif overcast:
        ambient, zenith, horizon, direct = (0.84, 0.86, 0.9), (168, 174, 182), (206, 208, 210), 0.0
    else:
        ambient, zenith, horizon, direct = (0.62, 0.66, 0.76), (82, 132, 200), (190, 212, 232), 0.72
    exposure = math.exp(float(rng.normal(0.12 if dusk else 0.02, 0.14)))
    warmth, tint = float(rng.normal(0, 0.07)), float(rng.normal(0, 0.025))
    return Light(
        sun=sun,
        direct=direct,
        ambient=ambient,
        zenith=zenith,
        horizon=horizon,
        cloud=1.0 if overcast else float(rng.uniform(0, 0.6)),
        dusk=dusk,
        season=season,
        gains=(exposure * (1 + warmth), exposure * (1 + tint), exposure * (1 - warmth)),
        gamma=float(rng.uniform(0.86, 1.16)),
        haze=float(rng.uniform(0.0005, 0.004)),
        blur_px=float(rng.uniform(0, 0.9)),
        noise=float(rng.uniform(2, 6)) * (1.6 if dusk else 1.0),
        quality=int(rng.integers(70, 93)),
    )
