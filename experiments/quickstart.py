"""Does everything work here? A small network on synthetic faces: about 2 minutes on two CPU cores, and 87 % ± 2.5.

python launch.py train quickstart
"""

from faceembed import config

EXPERIMENT = config.Experiment(
    steps=400,
    data=config.Data(source="synthetic", people=400, photos=12),
    encoder=config.ConvNet(widths=(16, 32, 64, 128)),
    batch=config.Batch(people=16, photos=4),
    schedule=config.Schedule(learning_rate=2e-3, warmup=40, ema=0.98),
    checkpoint=config.Checkpoint(every=200, log=20),
)
