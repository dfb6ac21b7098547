"""Targets: where a weight tensor may end."""

from detent.targets.base import Choice as Choice
from detent.targets.base import Params as Params
from detent.targets.base import Scope as Scope
from detent.targets.base import Target as Target
from detent.targets.codebook import KernelCodebook as KernelCodebook
from detent.targets.codebook import VectorCodebook as VectorCodebook
from detent.targets.composite import SparseLevels as SparseLevels
from detent.targets.forms import Form as Form
from detent.targets.held import Held as Held
from detent.targets.levels import Binary as Binary
from detent.targets.levels import LearnedLevels as LearnedLevels
from detent.targets.levels import PowerOfTwo as PowerOfTwo
from detent.targets.levels import Ternary as Ternary
from detent.targets.levels import Uniform as Uniform
from detent.targets.rate import UniformStep as UniformStep
from detent.targets.rounding import Round as Round
from detent.targets.sparse import NM as NM
from detent.targets.sparse import Sparse as Sparse
from detent.targets.sparse import Structured as Structured
from detent.targets.sparse import TopK as TopK
from detent.targets.zero import Zero as Zero
