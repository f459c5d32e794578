"""ksparse: LM.acts, which stops at the site."""

import torch
from common import arguments, serve

from ksparse.lm.model import LM

args, tokens = arguments()
lm = LM(args.lm, f"resid_post.{args.layer}", device="cpu")
attention = torch.ones_like(tokens, dtype=torch.bool)
serve(lambda: lm.acts(tokens, attention))
