#include "simt/runtime/warp.h"

#include "simt/checks/fault.h"

namespace softprompt::simt {
namespace {

struct Shuffled {
  uint64_t bits, result;
  Shuffle kind;
  int operand, width;
  const void* place;
};

// CUDA C++ Programming Guide, "Warp Shuffle Functions".
int source_lane(const Shuffled& one, int lane) {
  const int first = lane & ~(one.width - 1), last = first + one.width - 1;
  int source = lane;
  switch (one.kind) {
    case Shuffle::index: source = first + (one.operand & (one.width - 1)); break;
    case Shuffle::up: source = lane - one.operand; break;
    case Shuffle::down: source = lane + one.operand; break;
    case Shuffle::exclusive_or: source = lane ^ one.operand; break;
  }
  const bool outside = one.kind == Shuffle::exclusive_or ? source > last : source < first || source > last;
  return outside ? lane : source;
}

void combine_shuffle(void** arguments, Lanes mask) {
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& one = *static_cast<Shuffled*>(arguments[lane]);
    const int source = source_lane(one, lane);
    if (!(mask >> source & 1)) fail(one.place, "lane %d reads from lane %d, which is not in the mask", lane, source);
    one.result = static_cast<Shuffled*>(arguments[source])->bits;
  }
}

struct Voted {
  bool predicate;
  Lanes result;
};

void combine_vote(void** arguments, Lanes mask) {
  Lanes result = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1 && static_cast<Voted*>(arguments[lane])->predicate) result |= Lanes{1} << lane;
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) static_cast<Voted*>(arguments[lane])->result = result;
  }
}

}  // namespace

uint64_t shuffle(Shuffle kind, Lanes mask, uint64_t bits, int operand, int width) {
  const void* place = __builtin_return_address(0);
  Shuffled one = {bits, 0, kind, operand, width, place};
  if (width <= 0 || width > static_cast<int>(kLanes) || (width & (width - 1)) != 0) {
    fail(place, "a shuffle of width %d, which is no power of 2 up to 32", width);
  }
  meet(kShuffle + static_cast<int>(kind), mask, &one, combine_shuffle, place);
  return one.result;
}

Lanes ballot(Lanes mask, bool predicate) {
  Voted one = {predicate, 0};
  meet(kVote, mask, &one, combine_vote, __builtin_return_address(0));
  return one.result;
}

void sync_warp(Lanes mask) {
  const auto combine = [](void**, Lanes) { ++block().warps[thread().warp()].epoch; };
  meet(kSyncWarp, mask, nullptr, combine, __builtin_return_address(0));
}

}  // namespace softprompt::simt
