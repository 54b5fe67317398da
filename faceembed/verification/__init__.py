"""Verification of embeddings from anywhere, without JAX: is a pair of photos of one person, and how sure are we?"""

from faceembed.verification.compare import HeadResult as HeadResult
from faceembed.verification.compare import Results as Results
from faceembed.verification.compare import compare as compare
from faceembed.verification.features import EmbeddedPairs as EmbeddedPairs
from faceembed.verification.heads import HEADS as HEADS
from faceembed.verification.heads import USUAL_HEADS as USUAL_HEADS
from faceembed.verification.heads import Head as Head
from faceembed.verification.heads import fit as fit
