"""Targets: where a weight tensor may end."""

from detent.targets.base import Codes as Codes
from detent.targets.base import Params as Params
from detent.targets.base import Scope as Scope
from detent.targets.base import Stream as Stream
from detent.targets.base import Target as Target
from detent.targets.levels import Uniform as Uniform
from detent.targets.levels import Zero as Zero
from detent.targets.sparse import TopK as TopK
