"""Commands to start from, at the end of each verb's help."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "ksparse train --acts.lm gpt2 --acts.site resid_post.8 --acts.text my.txt --tokens 1000000",
        "ksparse train recipes/gpt2-small-32k.toml --out runs/gpt2 --sae.k 64",
        "ksparse train --acts.lm gpt2 --acts.site 'resid_post.*' --acts.text my.txt --out runs/all",
    ),
    "finetune": (
        "ksparse finetune runs/mine --tokens 25000000",
        "ksparse finetune runs/mine --loss none --tokens 25000000 --out runs/control",
    ),
    "resume": ("ksparse resume runs/mine", "ksparse resume runs/mine --run.save-minutes 5"),
    "demo": ("ksparse demo --out runs/demo",),
    "sweep": (
        "ksparse sweep recipes/sweeps/pylm.toml --plan",
        "ksparse sweep recipes/sweeps/pylm.toml --out sweeps/mine",
    ),
    "fit": (
        "ksparse fit sweeps/pylm --predict n=65536,k=32",
        "ksparse fit points.csv --law nk --out laws",
    ),
    "eval": (
        "ksparse eval runs/mine",
        "ksparse eval runs/mine downstream stats --tokens 20000",
        "ksparse eval their/sae --lm gpt2 --site resid_post.8 --text my.txt --out results/theirs",
    ),
    "compare": (
        "ksparse compare runs/k16 runs/k32",
        "ksparse compare runs/k16 runs/k32 --evals downstream,probes --json table.json",
    ),
    "explain": (
        "ksparse explain runs/mine",
        "ksparse explain runs/mine --url http://127.0.0.1:8000/v1 --model NAME --latents 50",
    ),
    "study": (
        "ksparse study paper --run runs/mine",
        "ksparse study baselines --tokens 200000 --seeds 2",
    ),
    "sanity": (
        "ksparse sanity runs/mine",
        "ksparse sanity runs/mine --controls seeds frozen_decoder",
    ),
    "probes": ("ksparse probes build suites/paper --only cola",),
    "report": ("ksparse report runs/mine",),
    "view": (
        "ksparse view runs/mine",
        "ksparse view runs/mine runs/other",
        "ksparse view runs/mine --export pages",
    ),
    "steer": (
        "ksparse steer runs/mine --latent 12 --scale 0 --prompt 'def area(self'",
        "ksparse steer runs/mine --latent 12 --value 0.5 --prompt 'def area(self' --tokens 60",
    ),
    "attribute": (
        "ksparse attribute runs/mine --prompt 'for i in' --toward ' range' --away ' self'",
    ),
    "convert": (
        "ksparse convert runs/mine exported --to sae_lens",
        "ksparse convert runs/mine pages --to sae_dashboard",
    ),
    "push": ("ksparse push runs/mine me/my-sae --visibility private",),
    "list": ("ksparse list gpt2", "ksparse list gpt2-small-res-jb --names"),
    "shard": (
        "ksparse shard --acts.lm gpt2 --acts.site resid_post.8 --acts.text my.txt --out acts",
        "ksparse shard --from features",
    ),
    "plan": (
        "ksparse plan recipes/gpt2-small-32k.toml",
        "ksparse plan recipes/gpt2-small-32k.toml --devices 1,8,64 --gpu h100",
    ),
    "bench": ("ksparse bench --n 16384 --k 32", "ksparse bench --lm pylm --site resid_post.3"),
    "doctor": ("ksparse doctor",),
    "help": ("ksparse help train",),
    "completion": (
        'eval "$(ksparse completion bash)"    # for this shell; put it in ~/.bashrc for all',
        "ksparse completion fish > ~/.config/fish/completions/ksparse.fish",
    ),
}
"""For each verb, at least one command line as it is typed."""
