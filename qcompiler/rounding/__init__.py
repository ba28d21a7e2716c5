"""How the numbers of a quantized weight are found: one file for each method."""

from qcompiler.rounding.adaround import AdaRound
from qcompiler.rounding.base import Block, Inputs, Layer, Rounding, gram_of, output_error
from qcompiler.rounding.clip import Clip
from qcompiler.rounding.decoupleq import DecoupleQ
from qcompiler.rounding.descent import QuantEase
from qcompiler.rounding.flexround import FlexRound
from qcompiler.rounding.gptq import Gptq
from qcompiler.rounding.hqq import Hqq
from qcompiler.rounding.kmeans import KMeans
from qcompiler.rounding.learned import Learned
from qcompiler.rounding.nearest import Nearest, nearest
from qcompiler.rounding.search import Search
from qcompiler.rounding.signround import SignRound
from qcompiler.rounding.spqr import SpQR

__all__ = [
    "AdaRound",
    "Block",
    "Clip",
    "DecoupleQ",
    "FlexRound",
    "Gptq",
    "Hqq",
    "Inputs",
    "KMeans",
    "Layer",
    "Learned",
    "Nearest",
    "QuantEase",
    "Rounding",
    "Search",
    "SignRound",
    "SpQR",
    "gram_of",
    "nearest",
    "output_error",
]
