"""Verification of embeddings from anywhere, without JAX: is a pair of photos of one person, and how sure are we?"""

from faceembed.verification.compare import HeadResult as HeadResult
from faceembed.verification.compare import Results as Results
from faceembed.verification.compare import compare as compare
from faceembed.verification.dense import DenseResults as DenseResults
from faceembed.verification.dense import compare_all as compare_all
from faceembed.verification.features import EmbeddedPairs as EmbeddedPairs
from faceembed.verification.heads import HEADS as HEADS
from faceembed.verification.heads import USUAL_HEADS as USUAL_HEADS
from faceembed.verification.heads import Head as Head
from faceembed.verification.heads import fit as fit
from faceembed.verification.slices import by_cluster as by_cluster
from faceembed.verification.slices import slice_report as slice_report
