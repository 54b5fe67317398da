"""Training on aligned CelebA photographs, for two CPU cores.

python launch.py data prepare celeba --archive img_align_celeba_10k.tar --identities identity_CelebA.txt
python launch.py train celeba
"""

from faceembed import config

EXPERIMENT = config.Experiment(
    steps=2400,
    data=config.Data(source="celeba"),
    encoder=config.ConvNet(),
    batch=config.Batch(people=48, photos=4),
    loss=config.Triplet(margin=0.2, miner="semi_hard"),
    schedule=config.Schedule(learning_rate=2e-3, warmup=100, weight_decay=0.05, ema=0.995),
    checkpoint=config.Checkpoint(every=200, log=50),
)
