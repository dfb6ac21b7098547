"""Files: one run as one small, checked file, and back."""

from detent.pack.bits import pack_bits as pack_bits
from detent.pack.bits import unpack_bits as unpack_bits
from detent.pack.checkpoint import Checkpoint as Checkpoint
from detent.pack.coding import CODINGS as CODINGS
from detent.pack.coding import Coding as Coding
from detent.pack.container import Reader as Reader
from detent.pack.container import Writer as Writer
from detent.pack.container import unpack as unpack
from detent.pack.header import FormatError as FormatError
from detent.pack.inspection import Inspection as Inspection
from detent.pack.inspection import inspect as inspect
from detent.pack.loading import Loaded as Loaded
from detent.pack.loading import load as load
from detent.pack.runs import read_header as read_header
from detent.pack.runs import save as save
from detent.pack.runs import sizes as sizes
from detent.pack.shown import Header as Header
