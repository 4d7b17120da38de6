"""Is an attention function right? The room of the oracle, the error budget and the cases.

Nothing here knows how an implementation works. `oracle` says what the answer is and how well
conditioned each of its elements is, `budget` how far from it a correct implementation may land,
`cases` what to ask, `distributions` with which numbers, `memory` how to catch stray reads.
"""
