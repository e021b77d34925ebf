// Divides an attention call into work units, by rows and, with few rows and a long prompt, by keys (split-KV).
#include "cpu/attention/plan.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/attention/visible_keys.h"
#include "cpu/platform/integers.h"

namespace softprompt {
namespace {

constexpr int64_t kUnitsPerThread = 8;     // enough that no thread waits long for another
constexpr int64_t kMinUnitRows = 48;       // fewer do not make up for packing the keys of a tile
constexpr int64_t kMinSplitKeys = 256;     // prompt keys of one part of a split unit
constexpr int64_t kMinSplitPrompt = 1024;  // a shorter prompt is packed by several threads rather than split
// The costs of packing a key, and of loading and storing a row. The unit of cost is one key seen by one row.
constexpr int64_t kCostOfKey = 12, kCostOfRow = 24;

void check(const char* name, int64_t value, int64_t low, int64_t high, int64_t at) {
  if (value < low || value > high) {
    throw std::invalid_argument(std::string(name) + " must be in [" + std::to_string(low) + ", " +
                                std::to_string(high) + "]; got " + std::to_string(value) + " at " + std::to_string(at));
  }
}

// Adds the units of one key head, of at most `max_rows` rows: slices of long sequences, or several short sequences.
void add_units(AttentionPlan& plan, const AttentionProblem& problem, const std::vector<int64_t>& order, int64_t kv_head,
               int64_t max_rows) {
  bool extendable = false;  // whether more sequences may join the last unit
  for (const int64_t s : order) {
    const Sequence& sequence = plan.sequences[s];
    const int64_t rows = sequence.queries * problem.group;
    const int64_t align = 2 * rows >= problem.row_align ? problem.row_align : 1;
    const int64_t steps = ceil_div(rows, align), parts = ceil_div(steps, max_rows / align);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t row = steps * part / parts * align;
      const int64_t count = min64(rows, steps * (part + 1) / parts * align) - row, padded = round_up(count, align);
      const int64_t slice = static_cast<int64_t>(plan.slices.size());
      plan.slices.push_back({s, row, count, false});
      WorkUnit* const last = extendable ? &plan.units.back() : nullptr;
      if (last != nullptr && last->prompt == sequence.prompt && last->row_align == align &&
          last->rows + padded <= max_rows) {
        ++last->slices;
        last->rows += padded;
      } else {
        plan.units.push_back(
            {kv_head, sequence.prompt, slice, 1, padded, align, 0, sequence.prompt_length, true, false, -1});
      }
      extendable = parts == 1;
    }
  }
}

int64_t visible_count(const AttentionProblem& problem, const WorkUnit& unit, const Sequence& sequence, int64_t query) {
  const PositionRange range = intersection(visible_range(problem, sequence, query), unit_range(unit, sequence));
  return max64(0, range.end - range.begin);
}

// The cost of a unit. The number of keys that a row sees is about linear along a slice, so the mean of the first and
// the last row stands for all.
double cost(const AttentionPlan& plan, const AttentionProblem& problem, const WorkUnit& unit) {
  double keys = 0, visible = 0;
  for (int64_t p = unit.first_slice; p < unit.first_slice + unit.slices; ++p) {
    const SequenceSlice& slice = plan.slices[p];
    const Sequence& sequence = plan.sequences[slice.sequence];
    const int64_t first = visible_count(problem, unit, sequence, slice.row / problem.group);
    const int64_t last = visible_count(problem, unit, sequence, (slice.row + slice.rows - 1) / problem.group);
    visible += 0.5 * static_cast<double>(slice.rows) * static_cast<double>(first + last);
    keys += static_cast<double>(max64(first, last));
  }
  return visible + static_cast<double>(kCostOfKey) * keys + static_cast<double>(kCostOfRow * unit.rows);
}

// Gives each thread consecutive units, so that all threads have about the same cost.
void assign(AttentionPlan& plan, const AttentionProblem& problem) {
  std::vector<double> costs;
  for (const WorkUnit& unit : plan.units) costs.push_back(cost(plan, problem, unit));
  const double total = std::accumulate(costs.begin(), costs.end(), 0.0);
  plan.thread_units.assign(1, 0);
  double cost_before = 0;
  for (size_t u = 0; u < costs.size(); ++u) {
    const double middle = cost_before + costs[u] / 2;
    while (static_cast<double>(plan.thread_units.size()) * total <= middle * problem.threads) {
      plan.thread_units.push_back(static_cast<int64_t>(u));
    }
    cost_before += costs[u];
  }
  plan.thread_units.push_back(static_cast<int64_t>(costs.size()));
  // A thread without a unit needs no memory and is not started.
  const auto last = std::unique(plan.thread_units.begin(), plan.thread_units.end());
  plan.thread_units.erase(last, plan.thread_units.end());
  if (plan.thread_units.size() == 1) plan.thread_units.push_back(0);
}

// Split-KV, for few rows and a long prompt: replaces each unit by several that attend to parts of the prompt.
void split_units(AttentionPlan& plan, const AttentionProblem& problem) {
  const int64_t count = static_cast<int64_t>(plan.units.size());
  if (count == 0 || problem.threads == 1 || count >= 2 * problem.threads) return;
  std::vector<WorkUnit> units;
  for (WorkUnit unit : plan.units) {
    const int64_t keys = unit.prompt_end;
    const int64_t parts = std::min((2 * problem.threads + count - 1) / count, keys / kMinSplitKeys);
    if (parts < 2) {
      units.push_back(unit);
      continue;
    }
    plan.split_groups.push_back({static_cast<int64_t>(units.size()), parts});
    const int64_t tiles = (keys + kTileKeys - 1) / kTileKeys;
    for (int64_t part = 0; part < parts; ++part) {
      unit.prompt_begin = tiles * part / parts * kTileKeys;
      unit.prompt_end = std::min(keys, tiles * (part + 1) / parts * kTileKeys);
      unit.own = part == parts - 1;
      unit.partial_row = plan.partial_rows;
      plan.partial_rows += unit.rows;
      units.push_back(unit);
    }
  }
  plan.units = std::move(units);
}

// Key ranges in the order of the units, each with the threads that add to its gradients.
class RangeList {
 public:
  void add(const KeyRange& keys, int64_t thread) {
    const bool is_last = !ranges_.empty() && ranges_.back().keys.batch == keys.batch &&
                         ranges_.back().keys.head == keys.head && ranges_.back().keys.first == keys.first;
    if (!is_last) ranges_.push_back({keys, thread, thread, first_of_thread(thread) ? 0 : 1});
    ranges_.back().last_thread = thread;
    thread_ = thread;
  }
  int64_t last() const { return static_cast<int64_t>(ranges_.size()) - 1; }
  bool shared(int64_t range) const { return ranges_[range].last_thread > ranges_[range].first_thread; }
  std::vector<SharedRange> all_shared() const {
    std::vector<SharedRange> found;
    std::copy_if(ranges_.begin(), ranges_.end(), std::back_inserter(found),
                 [](const SharedRange& r) { return r.last_thread > r.first_thread; });
    return found;
  }

 private:
  bool first_of_thread(int64_t thread) const { return thread != thread_; }

  std::vector<SharedRange> ranges_;
  int64_t thread_ = -1;
};

int64_t thread_of(const AttentionPlan& plan, int64_t unit) {
  const auto next = std::upper_bound(plan.thread_units.begin(), plan.thread_units.end(), unit);
  return static_cast<int64_t>(next - plan.thread_units.begin()) - 1;
}

}  // namespace

void AttentionPlan::attach(AttentionProblem& problem) const {
  problem.sequences = sequences.data();
  problem.slices = slices.data();
  problem.units = units.data();
  problem.thread_units = thread_units.data();
  problem.threads = static_cast<int>(thread_units.size()) - 1;
}

std::vector<Sequence> list_sequences(const AttentionSizes& sizes) {
  for (int64_t r = 0; sizes.prompt_lengths != nullptr && r < sizes.prompts; ++r) {
    check("prompt_lengths", sizes.prompt_lengths[r], 0, sizes.prompt_keys, r);
  }
  std::vector<Sequence> sequences;
  for (int64_t s = 0; s < sizes.sequences; ++s) {
    int64_t prompt = sizes.prompts == 1 ? 0 : s;
    if (sizes.prompt_index != nullptr) {
      prompt = sizes.prompt_index[s];
      check("prompt_index", prompt, 0, sizes.prompts - 1, s);
    }
    const int64_t length = sizes.prompt_lengths == nullptr ? sizes.prompt_keys : sizes.prompt_lengths[prompt];
    if (sizes.cu_seqlens != nullptr) {
      const int64_t begin = sizes.cu_seqlens[s], end = sizes.cu_seqlens[s + 1];
      if (s == 0) check("cu_seqlens", begin, 0, 0, 0);
      check("cu_seqlens", end, begin, sizes.queries, s + 1);
      sequences.push_back({0, begin, end - begin, begin, end - begin, end - begin, prompt, length});
    } else {
      const int64_t key_length = sizes.key_lengths == nullptr ? sizes.keys : sizes.key_lengths[s];
      check("key_lengths", key_length, 0, sizes.keys, s);
      sequences.push_back({s, 0, sizes.queries, 0, sizes.keys, key_length, prompt, length});
    }
  }
  return sequences;
}

AttentionPlan plan_attention(const AttentionProblem& problem, const AttentionSizes& sizes, bool split_keys) {
  AttentionPlan plan;
  plan.sequences = list_sequences(sizes);
  plan.covered_tokens = sizes.queries;
  if (sizes.cu_seqlens != nullptr) plan.covered_tokens = sizes.sequences > 0 ? sizes.cu_seqlens[sizes.sequences] : 0;
  std::vector<int64_t> order(plan.sequences.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return plan.sequences[a].prompt < plan.sequences[b].prompt; });
  int64_t rows = 0;
  for (const Sequence& sequence : plan.sequences) rows += sequence.queries * problem.group * problem.kv_heads;
  // With a long prompt and few rows, as in decoding, the keys are divided instead of the rows: see split_units.
  const bool divide_keys = split_keys && sizes.prompt_keys >= kMinSplitPrompt && rows <= kUnitRows * problem.kv_heads;
  const int64_t balanced = rows / (problem.threads * kUnitsPerThread) + 1;
  const int64_t target = divide_keys ? kUnitRows : std::min(kUnitRows, std::max(kMinUnitRows, balanced));
  const int64_t unit_rows = round_up(target, problem.row_align);
  for (int64_t head = 0; head < problem.kv_heads; ++head) add_units(plan, problem, order, head, unit_rows);
  if (split_keys) split_units(plan, problem);
  assign(plan, problem);
  return plan;
}

KeyRanges find_prompt_ranges(AttentionPlan& plan, const AttentionProblem& problem, const AttentionSizes& sizes) {
  RangeList ranges;
  std::vector<int64_t> range_of_unit;
  std::vector<bool> used(sizes.prompts, false);
  for (size_t u = 0; u < plan.units.size(); ++u) {
    const WorkUnit& unit = plan.units[u];
    ranges.add({unit.prompt, unit.kv_head, 0, sizes.prompt_keys}, thread_of(plan, static_cast<int64_t>(u)));
    range_of_unit.push_back(ranges.last());
    used[unit.prompt] = true;
  }
  for (size_t u = 0; u < plan.units.size(); ++u) plan.units[u].prompt_shared = ranges.shared(range_of_unit[u]);
  KeyRanges found{ranges.all_shared(), {}};
  for (int64_t r = 0; r < sizes.prompts; ++r) {
    for (int64_t head = 0; head < problem.kv_heads && !used[r]; ++head) {
      found.unused.push_back({r, head, 0, sizes.prompt_keys});
    }
  }
  return found;
}

KeyRanges find_own_ranges(AttentionPlan& plan, const AttentionProblem& problem, const AttentionSizes& sizes) {
  RangeList ranges;
  std::vector<int64_t> range_of_slice(plan.slices.size());
  for (size_t u = 0; u < plan.units.size(); ++u) {
    const WorkUnit& unit = plan.units[u];
    for (int64_t p = unit.first_slice; p < unit.first_slice + unit.slices; ++p) {
      const Sequence& sequence = plan.sequences[plan.slices[p].sequence];
      ranges.add({sequence.batch, unit.kv_head, sequence.first_key, sequence.keys},
                 thread_of(plan, static_cast<int64_t>(u)));
      range_of_slice[p] = ranges.last();
    }
  }
  for (size_t p = 0; p < plan.slices.size(); ++p) plan.slices[p].shared = ranges.shared(range_of_slice[p]);
  KeyRanges found{ranges.all_shared(), {}};
  for (int64_t head = 0; head < problem.kv_heads; ++head) {
    for (const Sequence& s : plan.sequences) {
      if (s.queries * problem.group == 0 && s.keys > 0) found.unused.push_back({s.batch, head, s.first_key, s.keys});
    }
    if (plan.covered_tokens < sizes.queries) {  // packed: queries and keys are the same tokens
      found.unused.push_back({0, head, plan.covered_tokens, sizes.queries - plan.covered_tokens});
    }
  }
  return found;
}

}  // namespace softprompt
