"""Files: one run as one small, checked file, and back."""

from detent.pack.container import FormatError as FormatError
from detent.pack.container import Header as Header
from detent.pack.container import load as load
from detent.pack.container import pack_bits as pack_bits
from detent.pack.container import read_header as read_header
from detent.pack.container import save as save
from detent.pack.container import sizes as sizes
from detent.pack.container import unpack_bits as unpack_bits
