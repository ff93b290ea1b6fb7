// SPDX-License-Identifier: Apache-2.0
// Putting the two products of the pivot layout together, pivot columns from one, the others from the other; and apart.
#pragma once

#include <cstdint>

namespace eigenprune {

// Fills merged[0 .. end - begin): for every column c from `begin` to `end`, the next of `pivot_values` where bit c of
// `is_pivot` is set, the next of `other_values` elsewhere. `is_pivot` has at least one bit more than `end`. Elements are only
// moved, so that their size is all that matters.
using MergeFunction = void (*)(
    const uint64_t* is_pivot, int64_t begin, int64_t end, const void* pivot_values, const void* other_values,
    void* merged);

// The other way round: takes `merged` [end - begin] apart.
using SplitFunction = void (*)(
    const uint64_t* is_pivot, int64_t begin, int64_t end, const void* merged, void* pivot_values, void* other_values);

// The quickest of this processor for elements of 2, 4 or 8 bytes.
MergeFunction merge_function(int64_t element_size);
SplitFunction split_function(int64_t element_size);

}  // namespace eigenprune
