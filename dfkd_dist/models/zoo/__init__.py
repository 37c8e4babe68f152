"""Networks for images of about 32 px, in the shapes that the knowledge-distillation literature uses.

Every module holds one family and a `NETWORKS` table (name -> constructor of `num_classes, in_channels`).
`dfkd_dist.models.registry` merges the tables. Parameter names equal those of the public teacher
checkpoints (DAFL, CMI, Fast-Datafree, MosaicKD, RepDistiller, SimKD), so that these load without conversion.
The classifiers of images end in global pooling: any input of 16 px or more works, and no number of classes is built
in. `tinyseg` and `deeplab` hold networks that classify pixels.
"""
