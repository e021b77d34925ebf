"""All peers, in the order of the table."""

from __future__ import annotations

from softprompt_kernels.bench.peers.compiled import COMPILE
from softprompt_kernels.bench.peers.cut_cross_entropy import CUT_CROSS_ENTROPY
from softprompt_kernels.bench.peers.eager import EAGER
from softprompt_kernels.bench.peers.fla import FLA
from softprompt_kernels.bench.peers.flash_attn import FLASH_ATTN
from softprompt_kernels.bench.peers.flex import FLEX
from softprompt_kernels.bench.peers.liger import LIGER
from softprompt_kernels.bench.peers.peer import Peer
from softprompt_kernels.bench.peers.peft import PEFT
from softprompt_kernels.bench.peers.sdpa import SDPA
from softprompt_kernels.bench.peers.trl import TRL

PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (EAGER, SDPA, COMPILE, FLEX, FLASH_ATTN, PEFT, LIGER, TRL, FLA, CUT_CROSS_ENTROPY)
}
