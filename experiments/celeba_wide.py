"""What do a wider network and larger batches give on the same photographs?  (Two hours on two idle cores.)

    python launch.py train celeba_wide
    python launch.py verify runs/celeba_wide --pairs lfw:view1_test

Chosen by the AUC of select people alone: 0.935 to 0.937 with weight decays from 0.25 to 1 (0.930 with 0.05, 0.932 with 2).
More steps or more parameters only fitted CelebA's people better. It sees no LFW image. Half the steps, `--steps 1000
--schedule.ema 0.995`, took 63 minutes on two shared cores: AUC 0.921 on select people, 84.8 % [82.4, 87.0] with
`logistic_distance` on LFW View 1 test, no gain over `celeba`. All steps on a GPU, with a weight decay of 0.25: 87.2 %.
"""

from faceembed import config

EXPERIMENT = config.Experiment(
    steps=2000,
    data=config.Data(source="celeba"),
    encoder=config.ConvNet(widths=(32, 64, 128, 256), blocks=(1, 2, 2, 2)),
    batch=config.Batch(people=96, photos=4),
    loss=config.Triplet(margin=0.2, miner="semi_hard"),
    schedule=config.Schedule(learning_rate=2e-3, warmup=100, weight_decay=1.0, ema=0.998),
    checkpoint=config.Checkpoint(every=200, log=50),
)
