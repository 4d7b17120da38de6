"""Replacing attention in models that already exist.

    from undivided.interop.transformers import register

    register()
    model.set_attn_implementation("undivided")

Nothing is imported until it is asked for: `transformers` is an optional dependency.
"""
