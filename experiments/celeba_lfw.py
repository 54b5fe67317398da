"""What do more people give? CelebA and the 4,038 people of LFW View 1's training half.  (An hour on two cores.)

    python launch.py train celeba_lfw
    python launch.py verify runs/celeba_lfw --pairs lfw:view1_test --fit heldout:celeba

It has seen LFW images: its heads come from held-out CelebA people, and it gives no View 2 figure (`verify` refuses). AUC
0.950 on select people, 87.5 % [85.2, 89.5] with `logistic_distance` on LFW View 1 test. The same without LFW's people is
`train celeba_wide --steps 1000 --schedule.ema 0.995`: 83.3 % [80.8, 85.6] with those heads.
"""

import dataclasses

from experiments import celeba_wide
from faceembed import config

EXPERIMENT = dataclasses.replace(
    celeba_wide.EXPERIMENT,
    steps=1000,
    data=config.Data(source="celeba_lfw"),
    schedule=dataclasses.replace(celeba_wide.EXPERIMENT.schedule, ema=0.995),
)
