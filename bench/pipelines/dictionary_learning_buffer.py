"""dictionary_learning: its ActivationBuffer over nnsight, and trainSAE with a TopKTrainer.

The buffer takes the first `context` tokens of each text, so texts are cut into pieces of about as many.
"""

from common import Clock, arguments, texts
from dictionary_learning import ActivationBuffer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from nnsight import LanguageModel
from transformers import AutoModelForCausalLM, AutoTokenizer

CHARACTERS = 4  # of a token, at most nearly always


def pieces(args):
    width = CHARACTERS * args.context
    for text in texts(args):
        yield from (text[at : at + width] for at in range(0, len(text), width))


def main() -> None:
    args = arguments()
    clock = Clock()
    # given a name, nnsight 0.3.7 makes the LM with a configuration that transformers 5 refuses; given the LM it does not
    model = LanguageModel(
        AutoModelForCausalLM.from_pretrained(args.lm, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(args.lm),
    )
    buffer = ActivationBuffer(
        pieces(args),
        model,
        model.model.layers[args.layer],
        d_submodule=args.d,
        n_ctxs=args.mix // args.context,
        ctx_len=args.context,
        refresh_batch_size=args.lm_batch,
        out_batch_size=args.batch,
        device="cpu",
    )
    steps = args.tokens // args.batch
    config = {
        "trainer": TopKTrainer,
        "dict_class": AutoEncoderTopK,
        "steps": steps,
        "activation_dim": args.d,
        "dict_size": args.n,
        "k": args.k,
        "layer": args.layer,
        "lm_name": str(args.lm),
        "device": "cpu",
        "seed": args.seed,
        "warmup_steps": min(1000, steps // 10),
    }
    trainSAE(buffer, [config], steps=steps, save_dir=str(args.out / "run"), device="cpu")
    clock.stop(
        args,
        "dictionary-learning",
        steps * args.batch,
        warmup_steps=min(1000, steps // 10),
        refresh="when half of the buffer is used",
    )


main()
