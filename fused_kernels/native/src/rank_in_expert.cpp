// For each choice in priority order, how many earlier ones of its group chose the same expert.
#include "native.h"

extern "C" int rank_in_expert(const int64_t* experts, int64_t* rank, int64_t* load, int64_t groups,
                              int64_t choices, int64_t num_experts) {
  std::fill_n(load, groups * num_experts, int64_t{0});
  for (int64_t g = 0; g < groups; g++) {
    int64_t* count = load + g * num_experts;
    for (int64_t a = g * choices; a < (g + 1) * choices; a++) {
      const int64_t expert = experts[a];
      if (expert < 0 || expert >= num_experts) return native::INDEX_OUT_OF_RANGE;
      rank[a] = count[expert]++;
    }
  }
  return native::OK;
}
