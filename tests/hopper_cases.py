"""Cases for the Hopper kernels, of several tiles of rows and of keys, so that their rings go round."""

from undivided.conformance.cases import Case

TILED = [
    Case("several tiles", heads_kv=1, seqlen_q=200, seqlen_k=700, head_dim=64),
    Case("causal", heads_kv=1, seqlen_q=333, seqlen_k=333, head_dim=64, causal=True),
    Case("causal, more keys", seqlen_q=203, seqlen_k=450, head_dim=128, causal=True),
    Case("causal, top-left", seqlen_q=450, seqlen_k=203, head_dim=64, causal=True, top_left=True),
    Case("window", seqlen_q=260, seqlen_k=390, head_dim=64, window=(130, 70)),
    Case("causal window", seqlen_q=400, seqlen_k=400, head_dim=128, causal=True, window=(100, None)),
    Case("exact tiles", seqlen_q=384, seqlen_k=512, head_dim=128),
    Case("one more than tiles", seqlen_q=193, seqlen_k=513, head_dim=128, causal=True),
    Case("a query", heads_q=3, heads_kv=1, seqlen_q=1, seqlen_k=300, head_dim=64, causal=True),
    Case("a key", seqlen_q=200, seqlen_k=1, head_dim=64),
    Case("groups of 3", batch=2, heads_q=3, heads_kv=1, seqlen_q=150, seqlen_k=150, head_dim=80, causal=True),
    Case("sinks", heads_kv=1, seqlen_q=140, seqlen_k=260, head_dim=64, sinks=True, causal=True),
    Case("layout bshd", seqlen_q=150, seqlen_k=270, head_dim=72, layout="bshd"),
    Case("scale 8", seqlen_q=140, seqlen_k=260, head_dim=64, scale=8.0),
]
