// Tensors cut into fixed-size chunks: the unit of work, of parallelism and of the norm's partial
// sums.
//
// NOTE [chunks are fixed]
// A chunk is at most 4096 consecutive elements of one row, whatever the backend, the number of
// threads, the ISA or the GPU. The norm sums each chunk into a slot of its own and then the slots
// in order, so its bits depend on the values and on the shapes of the rows, and on nothing else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fsam {

constexpr int64_t kChunk = 4096;

struct Row {
  void* param;
  const void* grad;  // null where the op takes none
  int64_t numel;
  int64_t offset;       // of the row's slice in every flat buffer, in elements
  int64_t first_chunk;  // number of chunks in the rows before
};

struct TensorTable {
  std::vector<Row> rows;
  int64_t chunks = 0;
  int64_t numel = 0;

  // To be called once all rows are there.
  void number_chunks() {
    for (Row& row : rows) {
      row.first_chunk = chunks;
      chunks += (row.numel + kChunk - 1) / kChunk;
      numel += row.numel;
    }
  }

  // Calls visit(row, begin, end) for the elements that the chunks [first, last) cover, row by row.
  template <class Visit>
  void for_rows(int64_t first, int64_t last, Visit&& visit) const {
    auto row = std::upper_bound(rows.begin(), rows.end(), first,
                                [](int64_t chunk, const Row& r) { return chunk < r.first_chunk; });
    for (--row; first < last && row != rows.end(); ++row) {
      const int64_t begin = (first - row->first_chunk) * kChunk;
      const int64_t end = std::min(row->numel, (last - row->first_chunk) * kChunk);
      if (begin < end) visit(*row, begin, end);
      first = row->first_chunk + (row->numel + kChunk - 1) / kChunk;
    }
  }
};

}  // namespace fsam
