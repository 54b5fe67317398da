"""How far does semi-hard triplet training get on a few thousand CelebA people, on two CPU cores?

    python launch.py data prepare celeba --archive img_align_celeba.zip --identities identity_CelebA.txt
    python launch.py train celeba
    python launch.py verify runs/celeba --pairs lfw:view1_test

With 15,974 photos of 5,561 people it takes 37 minutes on two busy cores; AUC 0.93 on select people, 84.4 % ± 1.2 with
`logistic_distance` on LFW View 1 test (heads fitted on View 1 train). It sees no LFW image.
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
