"""Random numbers that belong to names, never to ranks.

Initial weights, data order, timesteps, noise and dropout are drawn from generators seeded here by
(seed, what, step, sample, ...). So no parallel layout and no restart can change them
(DESIGN section 3: the layout never changes the run).
"""

import hashlib


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed that depends on every part and on nothing else.

    >>> derive_seed(1, "noise", 7, "clip-3") == derive_seed(1, "noise", 7, "clip-3")
    True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
