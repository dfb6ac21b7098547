"""Mechanisms: how training pulls weights to their target."""

from detent.mechanisms.base import Clock as Clock
from detent.mechanisms.base import Mechanism as Mechanism
from detent.mechanisms.base import Slot as Slot
from detent.mechanisms.gradient import PSG as PSG
from detent.mechanisms.latent import STE as STE
from detent.mechanisms.projection import Clip as Clip
from detent.mechanisms.projection import HardProjection as HardProjection
