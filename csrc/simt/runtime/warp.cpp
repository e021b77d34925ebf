#include "simt/runtime/warp.h"

#include "simt/checks/error.h"

namespace softprompt::simt {
namespace {

struct Shuffled {
  uint64_t bits, result;
  Shuffle kind;
  int operand, width;
  const void* place;
};

// As in the CUDA C++ Programming Guide, "Warp Shuffle Functions".
int source_lane(const Shuffled& call, int lane) {
  const int first = lane & ~(call.width - 1), last = first + call.width - 1;
  int source = lane;
  switch (call.kind) {
    case Shuffle::index: source = first + (call.operand & (call.width - 1)); break;
    case Shuffle::up: source = lane - call.operand; break;
    case Shuffle::down: source = lane + call.operand; break;
    case Shuffle::exclusive_or: source = lane ^ call.operand; break;
  }
  const bool outside = call.kind == Shuffle::exclusive_or ? source > last : source < first || source > last;
  return outside ? lane : source;
}

void combine_shuffle(void** arguments, LaneMask mask) {
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& call = *static_cast<Shuffled*>(arguments[lane]);
    const int source = source_lane(call, lane);
    if (!(mask >> source & 1)) fail(call.place, "lane %d reads from lane %d, which is not in the mask", lane, source);
    call.result = static_cast<Shuffled*>(arguments[source])->bits;
  }
}

struct Voted {
  bool predicate;
  LaneMask result;
};

void combine_vote(void** arguments, LaneMask mask) {
  LaneMask result = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1 && static_cast<Voted*>(arguments[lane])->predicate) result |= LaneMask{1} << lane;
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) static_cast<Voted*>(arguments[lane])->result = result;
  }
}

}  // namespace

uint64_t shuffle(Shuffle kind, LaneMask mask, uint64_t bits, int operand, int width) {
  const void* place = __builtin_return_address(0);
  Shuffled call = {bits, 0, kind, operand, width, place};
  if (width <= 0 || width > static_cast<int>(kLanes) || (width & (width - 1)) != 0) {
    fail(place, "a shuffle of width %d, which is not a power of 2 up to 32", width);
  }
  run_collective(kShuffle + static_cast<int>(kind), mask, &call, combine_shuffle, place);
  return call.result;
}

LaneMask ballot(LaneMask mask, bool predicate) {
  Voted call = {predicate, 0};
  run_collective(kVote, mask, &call, combine_vote, __builtin_return_address(0));
  return call.result;
}

void sync_warp(LaneMask mask) {
  const auto combine = [](void**, LaneMask) { ++block().warps[thread().warp()].epoch; };
  run_collective(kSyncWarp, mask, nullptr, combine, __builtin_return_address(0));
}

}  // namespace softprompt::simt
