#include "simt/checks/counters.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "simt/runtime/grid.h"

namespace softprompt::simt {
namespace {

bool on = false;
Counters total = {};

enum class Kind : uint8_t { load, store, shared, copy };

// One access of a warp: an instruction, and how many times each lane has come to it.
struct Key {
  const void* place;
  uint32_t warp, times;
  Kind kind;

  bool operator==(const Key& other) const {
    return place == other.place && warp == other.warp && times == other.times && kind == other.kind;
  }
};

struct Hash {
  size_t operator()(const Key& key) const {
    size_t value = reinterpret_cast<size_t>(key.place) * 0x9e3779b97f4a7c15u;
    value ^= (size_t{key.times} << 20) + (size_t{key.warp} << 8) + static_cast<size_t>(key.kind);
    return value * 0x9e3779b97f4a7c15u >> 7;
  }
};

struct Lane {
  uintptr_t address;
  uint32_t lane, bytes;
};

std::unordered_map<Key, std::vector<Lane>, Hash> accesses;
std::unordered_map<Key, uint32_t, Hash> visits;  // `times` holds the lane

void add(Kind kind, const void* address, size_t bytes, const void* place) {
  const Thread& self = thread();
  const uint32_t times = visits[{place, self.warp(), self.lane(), kind}]++;
  accesses[{place, self.warp(), times, kind}].push_back(
      {reinterpret_cast<uintptr_t>(address), self.lane(), static_cast<uint32_t>(bytes)});
}

constexpr uintptr_t kBanks = 32, kWord = 4, kSector = 32;

// Wavefronts that lanes need together.
uint64_t wavefronts(const Lane* begin, const Lane* end) {
  std::vector<uintptr_t> words;
  for (; begin != end; ++begin) {
    for (uintptr_t word = begin->address / kWord; word <= (begin->address + begin->bytes - 1) / kWord; ++word) {
      words.push_back(word);
    }
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  uint64_t of_bank[kBanks] = {}, most = 0;
  for (const uintptr_t word : words) most = std::max(most, ++of_bank[word % kBanks]);
  return most;
}

// Passes over shared memory that a warp's access takes, and wavefronts beyond one for each.
void add_passes(std::vector<Lane>& lanes, uint64_t& passes, uint64_t& conflicts) {
  std::sort(lanes.begin(), lanes.end(), [](const Lane& a, const Lane& b) { return a.lane < b.lane; });
  const uint32_t bytes = std::max<uint32_t>(lanes[0].bytes, kWord);
  const uint32_t together = std::max<uint32_t>(1, kBanks * kWord / bytes);  // lanes
  for (size_t begin = 0; begin < lanes.size();) {
    size_t end = begin;
    while (end < lanes.size() && lanes[end].lane / together == lanes[begin].lane / together) ++end;
    const uint64_t needed = wavefronts(&lanes[begin], &lanes[begin] + (end - begin));
    passes += 1;
    conflicts += needed - 1;
    begin = end;
  }
}

uint64_t sectors(const std::vector<Lane>& lanes) {
  std::vector<uintptr_t> touched;
  for (const Lane& lane : lanes) {
    for (uintptr_t s = lane.address / kSector; s <= (lane.address + lane.bytes - 1) / kSector; ++s) touched.push_back(s);
  }
  std::sort(touched.begin(), touched.end());
  return static_cast<uint64_t>(std::unique(touched.begin(), touched.end()) - touched.begin());
}

}  // namespace

bool counting() { return on; }
void set_counting(bool value) { on = value; }
Counters counters() { return total; }
void reset_counters() { total = {}; }

void count_launch(size_t shared_bytes) {
  if (!on) return;
  total.launches += 1;
  total.most_shared_bytes = std::max<uint64_t>(total.most_shared_bytes, shared_bytes);
}

void count_barrier() { total.barriers += on; }
void count_product() { total.products += on; }
void count_atomic() { total.atomics += on; }

void count_access(const void* address, size_t bytes, bool store, bool shared, const void* place) {
  if (!on) return;
  if (!shared) (store ? total.stored_bytes : total.loaded_bytes) += bytes;
  add(shared ? Kind::shared : store ? Kind::store : Kind::load, address, bytes, place);
}

void count_copy(const void* to, const void* place) {
  if (on) add(Kind::copy, to, 16, place);
}

void count_matrix_load(void* const* rows, uint32_t count) {
  if (!on) return;
  std::vector<Lane> lanes;
  for (uint32_t i = 0; i < count; ++i) lanes.push_back({reinterpret_cast<uintptr_t>(rows[i]), i, 16});
  add_passes(lanes, total.shared_passes, total.matrix_conflicts);
}

void count_block() {
  if (!on) return;
  total.blocks += 1;
  for (auto& [key, lanes] : accesses) {
    switch (key.kind) {
      case Kind::load: total.loaded_sectors += sectors(lanes); break;
      case Kind::store: total.stored_sectors += sectors(lanes); break;
      case Kind::shared: add_passes(lanes, total.shared_passes, total.shared_conflicts); break;
      case Kind::copy: add_passes(lanes, total.shared_passes, total.copy_conflicts); break;
    }
  }
  forget_accesses();
}

void forget_accesses() {
  accesses.clear();
  visits.clear();
}

}  // namespace softprompt::simt
