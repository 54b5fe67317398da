"""What do more people give? CelebA and the 4,038 people of LFW View 1's training half.

    python launch.py train celeba_lfw
    python launch.py verify runs/celeba_lfw --pairs lfw:view1_test --fit heldout:celeba

It has seen LFW images: its heads come from held-out CelebA people, and it gives no View 2 figure (`verify` refuses).
"""

import dataclasses

from experiments import celeba
from faceembed import config

EXPERIMENT = dataclasses.replace(celeba.EXPERIMENT, data=config.Data(source="celeba_lfw"))
