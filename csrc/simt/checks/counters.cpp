#include "simt/checks/counters.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "simt/runtime/grid.h"

namespace softprompt::simt {
namespace {

bool enabled = false;
Counters total = {};

enum class Kind : uint8_t { load, store, shared, copy };

// One access of a warp: an instruction, and how often each lane had come to it before.
struct Key {
  const void* place;
  uint32_t warp, visit;
  Kind kind;

  bool operator==(const Key& other) const {
    return place == other.place && warp == other.warp && visit == other.visit && kind == other.kind;
  }
};

struct Hash {
  size_t operator()(const Key& key) const {
    size_t value = reinterpret_cast<size_t>(key.place) * 0x9e3779b97f4a7c15u;
    value ^= (size_t{key.visit} << 20) + (size_t{key.warp} << 8) + static_cast<size_t>(key.kind);
    return value * 0x9e3779b97f4a7c15u >> 7;
  }
};

struct Lane {
  uintptr_t address;
  uint32_t lane, bytes;
};

std::unordered_map<Key, std::vector<Lane>, Hash> accesses;
std::unordered_map<Key, uint32_t, Hash> visits;  // `visit` holds the lane here

void add(Kind kind, const void* address, size_t bytes, const void* place) {
  const Thread& self = thread();
  const uint32_t visit = visits[{place, self.warp(), self.lane(), kind}]++;
  accesses[{place, self.warp(), visit, kind}].push_back(
      {reinterpret_cast<uintptr_t>(address), self.lane(), static_cast<uint32_t>(bytes)});
}

constexpr uintptr_t kBanks = 32, kWord = 4, kSector = 32;

// The wavefronts of one pass.
uint64_t wavefronts(const Lane* begin, const Lane* end) {
  std::vector<uintptr_t> words;
  for (; begin != end; ++begin) {
    for (uintptr_t word = begin->address / kWord; word <= (begin->address + begin->bytes - 1) / kWord; ++word) {
      words.push_back(word);
    }
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  uint64_t words_of_bank[kBanks] = {}, most = 0;
  for (const uintptr_t word : words) most = std::max(most, ++words_of_bank[word % kBanks]);
  return most;
}

// Adds the passes of a warp's access to shared memory, and its wavefronts beyond one a pass.
void add_passes(std::vector<Lane>& lanes, uint64_t& passes, uint64_t& conflicts) {
  std::sort(lanes.begin(), lanes.end(), [](const Lane& a, const Lane& b) { return a.lane < b.lane; });
  const uint32_t bytes = std::max<uint32_t>(lanes[0].bytes, kWord);
  const uint32_t lanes_per_pass = std::max<uint32_t>(1, kBanks * kWord / bytes);
  for (size_t begin = 0; begin < lanes.size();) {
    size_t end = begin;
    while (end < lanes.size() && lanes[end].lane / lanes_per_pass == lanes[begin].lane / lanes_per_pass) ++end;
    const uint64_t needed = wavefronts(&lanes[begin], &lanes[begin] + (end - begin));
    passes += 1;
    conflicts += needed - 1;
    begin = end;
  }
}

uint64_t sectors(const std::vector<Lane>& lanes) {
  std::vector<uintptr_t> touched;
  for (const Lane& lane : lanes) {
    const uintptr_t last = (lane.address + lane.bytes - 1) / kSector;
    for (uintptr_t sector = lane.address / kSector; sector <= last; ++sector) touched.push_back(sector);
  }
  std::sort(touched.begin(), touched.end());
  return static_cast<uint64_t>(std::unique(touched.begin(), touched.end()) - touched.begin());
}

}  // namespace

bool counting() { return enabled; }
void set_counting(bool value) { enabled = value; }
Counters counters() { return total; }
void reset_counters() { total = {}; }

void count_launch(size_t shared_bytes) {
  if (!enabled) return;
  total.launches += 1;
  total.max_shared_bytes = std::max<uint64_t>(total.max_shared_bytes, shared_bytes);
}

void count_barrier() { total.barriers += enabled; }
void count_mma() { total.mma += enabled; }
void count_atomic() { total.atomics += enabled; }

void count_access(const void* address, size_t bytes, bool store, bool shared, const void* place) {
  if (!enabled) return;
  if (!shared) (store ? total.stored_bytes : total.loaded_bytes) += bytes;
  add(shared ? Kind::shared : store ? Kind::store : Kind::load, address, bytes, place);
}

void count_copy(const void* to, const void* place) {
  if (enabled) add(Kind::copy, to, 16, place);
}

void count_matrix_load(void* const* rows, uint32_t count) {
  if (!enabled) return;
  std::vector<Lane> lanes;
  for (uint32_t i = 0; i < count; ++i) lanes.push_back({reinterpret_cast<uintptr_t>(rows[i]), i, 16});
  add_passes(lanes, total.shared_passes, total.matrix_conflicts);
}

void count_block() {
  if (!enabled) return;
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
