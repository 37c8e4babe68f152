import time
def nothing(rank,size): return 0
def timed(rank,size,tree):
    s=time.time()
    from tests.distributed import test_equivalence as te
    a=time.time()-s
    from dfkd_dist.config import Recipe, parse
    from dfkd_dist.engine.build import build
    import torch
    s=time.time(); b=build(parse(Recipe,tree),torch.device('cpu'),size); c=time.time()-s
    s=time.time(); b.trainer.fit(); d=time.time()-s
    return a,c,d
