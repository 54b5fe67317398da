"""Identification: enrolment from one photo, claims, and a search among K that knows what K does to its errors."""

from faceembed.identification.gallery import Candidate as Candidate
from faceembed.identification.gallery import Claim as Claim
from faceembed.identification.gallery import Gallery as Gallery
from faceembed.identification.gallery import Identification as Identification
from faceembed.identification.openset import Mated as Mated
from faceembed.identification.openset import NonMated as NonMated
from faceembed.identification.openset import Searches as Searches
from faceembed.identification.openset import fpir as fpir
from faceembed.identification.openset import tpir as tpir
from faceembed.identification.policy import Cut as Cut
from faceembed.identification.policy import thresholds as thresholds
from faceembed.identification.protocol import evaluate as evaluate
from faceembed.identification.store import Entry as Entry
from faceembed.identification.store import Origin as Origin
from faceembed.identification.store import Template as Template
from faceembed.identification.store import open_store as open_store
