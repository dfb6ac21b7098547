"""Mechanisms: how training pulls weights to their target."""

from detent.mechanisms.admm import ADMM as ADMM
from detent.mechanisms.admm import Penalty as Penalty
from detent.mechanisms.admm import periodic_rate as periodic_rate
from detent.mechanisms.admm import residuals as residuals
from detent.mechanisms.base import Mechanism as Mechanism
from detent.mechanisms.base import Slot as Slot
from detent.mechanisms.cadence import Cadence as Cadence
from detent.mechanisms.cadence import Clock as Clock
from detent.mechanisms.codebook import CodebookLearning as CodebookLearning
from detent.mechanisms.gradient import PSG as PSG
from detent.mechanisms.latent import PARQ as PARQ
from detent.mechanisms.latent import PMF as PMF
from detent.mechanisms.latent import STE as STE
from detent.mechanisms.latent import BinaryRelax as BinaryRelax
from detent.mechanisms.latent import GDTanh as GDTanh
from detent.mechanisms.latent import MirrorDescent as MirrorDescent
from detent.mechanisms.maps import MirrorMap as MirrorMap
from detent.mechanisms.maps import SoftmaxMap as SoftmaxMap
from detent.mechanisms.maps import TanhMap as TanhMap
from detent.mechanisms.maps import check_map as check_map
from detent.mechanisms.projection import Clip as Clip
from detent.mechanisms.projection import HardProjection as HardProjection
from detent.mechanisms.projection import Masked as Masked
from detent.mechanisms.projection import PartialFreeze as PartialFreeze
from detent.mechanisms.projection import Proximal as Proximal
