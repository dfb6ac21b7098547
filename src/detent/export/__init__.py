"""Exports: the compressed life in other tools' formats."""

from detent.export.activations import Activations as Activations
from detent.export.graph import Exported as Exported
from detent.export.graph import OnnxReport as OnnxReport
from detent.export.hf import HfCheck as HfCheck
from detent.export.hf import HfReport as HfReport
from detent.export.hf import check_compressed_tensors as check_compressed_tensors
from detent.export.hf import to_compressed_tensors as to_compressed_tensors
from detent.export.integer import to_integer as to_integer
from detent.export.integer_onnx import integers_to_onnx as integers_to_onnx
from detent.export.integer_steps import IntegerModel as IntegerModel
from detent.export.integer_steps import Step as Step
from detent.export.latency import Latency as Latency
from detent.export.latency import onnx_latency as onnx_latency
from detent.export.onnx import to_onnx as to_onnx
from detent.export.slim import Folded as Folded
from detent.export.slim import LayerSize as LayerSize
from detent.export.slim import Slimmed as Slimmed
from detent.export.slim import fold_dead_units as fold_dead_units
from detent.export.slim import slim as slim
