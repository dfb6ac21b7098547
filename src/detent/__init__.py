"""Detent: train networks whose weights click into places that are cheap to store."""

from detent.engine import Run as Run
from detent.engine import attach as attach
from detent.engine import compress as compress
from detent.grouping import Channel as Channel
from detent.grouping import Group as Group
from detent.grouping import Layout as Layout
from detent.grouping import PerTensor as PerTensor
from detent.lives import Encoded as Encoded
from detent.mechanisms import ADMM as ADMM
from detent.mechanisms import PSG as PSG
from detent.mechanisms import STE as STE
from detent.mechanisms import Clip as Clip
from detent.mechanisms import HardProjection as HardProjection
from detent.mechanisms import Masked as Masked
from detent.mechanisms import Mechanism as Mechanism
from detent.mechanisms import PartialFreeze as PartialFreeze
from detent.mechanisms import Penalty as Penalty
from detent.mechanisms import Proximal as Proximal
from detent.mechanisms import periodic_rate as periodic_rate
from detent.mechanisms import residuals as residuals
from detent.pack import FormatError as FormatError
from detent.pack import load as load
from detent.pack import save as save
from detent.recipe import Plan as Plan
from detent.recipe import Recipe as Recipe
from detent.recipe import Rule as Rule
from detent.recipe import Stage as Stage
from detent.schedules import Cosine as Cosine
from detent.schedules import Cubic as Cubic
from detent.schedules import Exponential as Exponential
from detent.schedules import Linear as Linear
from detent.schedules import Schedule as Schedule
from detent.targets import NM as NM
from detent.targets import Codes as Codes
from detent.targets import Params as Params
from detent.targets import SparseLevels as SparseLevels
from detent.targets import Stream as Stream
from detent.targets import Structured as Structured
from detent.targets import Target as Target
from detent.targets import TopK as TopK
from detent.targets import Uniform as Uniform
from detent.targets import Zero as Zero

__version__ = "0.1.0.dev0"
