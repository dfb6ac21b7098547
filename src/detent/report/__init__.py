"""Reports: what was measured (:mod:`detent.report.record`), what a file or a run holds, and how both are shown."""

from detent.report.card import Card as Card
from detent.report.card import card_of as card_of
from detent.report.files import card_of_file as card_of_file
from detent.report.files import collect_file as collect_file
from detent.report.files import run_of_file as run_of_file
from detent.report.numbers import Export as Export
from detent.report.numbers import History as History
from detent.report.numbers import Layer as Layer
from detent.report.numbers import Moment as Moment
from detent.report.numbers import Report as Report
from detent.report.numbers import Width as Width
from detent.report.numbers import collect as collect
from detent.report.page import write_html as write_html
