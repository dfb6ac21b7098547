"""Files: one run as one small, checked file, and back."""

from detent.pack.bits import pack_bits as pack_bits
from detent.pack.bits import unpack_bits as unpack_bits
from detent.pack.container import load as load
from detent.pack.container import read_header as read_header
from detent.pack.container import save as save
from detent.pack.container import sizes as sizes
from detent.pack.header import FormatError as FormatError
from detent.pack.header import Header as Header
