"""Names of the parameters of a twelve-layer encoder."""

ENCODER = [
    "bert.embeddings.word.weight",
    "bert.embeddings.position.weight",
    "bert.embeddings.norm.weight",
    "bert.embeddings.norm.bias",
    *(
        f"bert.encoder.layer.{i}.{part}.{kind}"
        for i in range(12)
        for part in ("query", "key", "value", "output", "norm")
        for kind in ("weight", "bias")
    ),
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "head.bias",
]
