"""Networks with heads beside them for what their sampler chooses: the order of tokens, the lengths of blocks."""

from __future__ import annotations

from collections.abc import Callable

import jax

from hdlm_jax.common.parallel import Tree
from hdlm_jax.models import block_lengths, order
from hdlm_jax.models.decoder import Decoder
from hdlm_jax.models.network import Network, Transformer

# name of the head's parameters -> (key, width, levels) -> parameters
HEADS: dict[str, Callable[[jax.Array, int, int], Tree]] = {order.NAME: order.init,
                                                           block_lengths.NAME: block_lengths.init}


class _Choosing(Transformer):
    """chooses: names of the heads beside the network."""

    chooses: tuple[str, ...] = ()

    def init_params(self, key: jax.Array, seq_len: int) -> Tree:
        levels = self.head.hierarchy.num_levels
        own = {name: init(jax.random.fold_in(key, 1 + i), self.width, levels)
               for i, (name, init) in enumerate(HEADS.items()) if name in self.chooses}
        return {**super().init_params(key, seq_len), **own}


class ChoosingNetwork(_Choosing, Network):
    pass


class ChoosingDecoder(_Choosing, Decoder):
    pass
