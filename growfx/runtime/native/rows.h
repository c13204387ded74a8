// Which networks compute each row of a batch by itself, so that a batch may be computed in parts.

#pragma once

#include <vector>

#include "network.h"

namespace growfx_native {

// Whether no step mixes rows, at any batch size; `once`, by step: it depends on constants alone. False where it is not
// known.
bool is_by_rows(const Network& network, const std::vector<char>& once);

// Whether weights are fewer bytes than what the steps write and read for one row: then it costs less to read weights
// again for every part than to move the values of a whole batch out of the caches and back.
bool is_light(const Network& network);

}  // namespace growfx_native
