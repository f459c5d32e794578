"""ksparse: `ksparse.train` with the recipe's defaults."""

from common import Clock, arguments

import ksparse
from ksparse.config import from_dict


def main() -> None:
    args = arguments()
    clock = Clock()
    recipe = from_dict(
        {
            "acts": {
                "lm": str(args.lm),
                "site": f"resid_post.{args.layer}",
                "text": str(args.text),
                "context": args.context,
                "lm_batch": args.lm_batch,
                "mix": args.mix,
            },
            "sae": {"n_latents": args.n, "k": args.k},
            "run": {"device": "cpu"},
            "tokens": args.tokens,
            "batch": args.batch,
            "seed": args.seed,
            "threads": args.threads,
        }
    )
    run = ksparse.train(recipe, args.out / "run")
    clock.stop(
        args,
        "ksparse",
        run.metrics()[-1]["tokens"],
        lr=recipe.lr,
        auxk=recipe.sae.auxk_coef,
        ema=recipe.ema,
        dead_after=recipe.dead_after,
    )


main()
