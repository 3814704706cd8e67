// What a launch works on: a table of rows as a kernel parameter, and which elements of them a warp takes.
#pragma once

#include <cuda_runtime.h>

#include "../tensor_table.h"

namespace fsam::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// NOTE [one warp, one piece]
// A warp walks consecutive elements and never waits for another. In a large row the eight warps of
// a block take an eighth of a chunk each; a row of at most kWarpRow elements is the work of one
// warp, so that thousands of biases and norms do not cost a block each. Which of the two a row is
// depends on its size alone, and so does the order of every sum.
constexpr int kPiece = int(kChunk) / kWarps;
constexpr int kWarpRow = 2048;

// NOTE [several chunks a block]
// What a block does once (find its row, wait for its scalars, fill and drain) is a quarter of the instructions of one
// chunk and a twentieth of those of eight. Where a call has chunks to spare, a block takes up to kMaxSpan consecutive
// ones of its row, and each warp its piece of each. Chunks are spare as long as kBlocksToSpare blocks are left, several
// times as many as a GPU holds at once: with fewer, multiprocessors would idle while the last blocks end. No sum
// depends on it.
#ifndef FSAM_BLOCKS_TO_SPARE  // the emulation has none to spare: its tensors are small
#define FSAM_BLOCKS_TO_SPARE 2048
#endif
constexpr int kMaxSpan = 8;
constexpr int64_t kBlocksToSpare = FSAM_BLOCKS_TO_SPARE;

// NOTE [the table is a kernel parameter]
// The rows travel by value with the launch: no copy to the device, no pinned buffer that would have
// to outlive it, nothing for a CUDA graph to freeze but the pointers themselves. Since CUDA 12.1 a
// kernel takes 32,764 bytes of parameters. All of them are written for each launch, so there are
// tables of three sizes: 64 rows are 2.6 KB, 256 are 10 KB.
//
// The search for a block's row waits for each look into the table. The hints cut it short: large rows hold most blocks,
// so between two of kHints equally distant blocks there are few rows to choose from.
constexpr int kHints = 128;

template <int kRows>
struct Table {
  static constexpr int kCapacity = kRows;
  void* param[kRows];
  const void* grad[kRows];
  int64_t offset[kRows];       // of the row's slice in every flat buffer, in elements
  int64_t numel[kRows];        // never 0
  int32_t first_block[kRows];  // of a large row
  int32_t id[kRows];           // noise_norm, perturb: the row's first chunk; restore_adam: its number
  int32_t large;               // rows [0, large) are large, rows [large, rows) are the work of one warp
  int32_t rows;
  int32_t large_blocks;
  int32_t span;              // chunks of a block
  int32_t hint_shift;        // log2 of the distance of hints
  int16_t hint[kHints + 1];  // hint[i]: the row of block i << hint_shift, or the last large one
};
constexpr int kSmallTable = 64;
constexpr int kMiddleTable = 256;
constexpr int kLargeTable = 800;

// What one warp works on: of a row of the table, the elements [begin, begin + n) but for gaps. In a large row these are
// pieces of kPiece elements, a chunk apart, the last of which may be shorter.
struct Piece {
  int row;
  int64_t begin;
  int n;
  bool large;
};

template <class Rows>
__device__ __forceinline__ int large_row_of(const Rows& table, int block) {
  int row = 0, after = table.large;  // it is in [row, after)
  if (after > 1) {
    const int hint = block >> table.hint_shift;
    row = table.hint[hint];
    after = table.hint[hint + 1] + 1;
  }
  while (after - row > 1) {
    const int middle = (row + after) / 2;
    if (table.first_block[middle] <= block) {
      row = middle;
    } else {
      after = middle;
    }
  }
  return row;
}

template <class Rows>
__device__ __forceinline__ Piece piece_of(const Rows& table, int warp) {
  const int block = blockIdx.x;
  if (block >= table.large_blocks) {
    const int row = table.large + (block - table.large_blocks) * kWarps + warp;
    return row < table.rows ? Piece{row, 0, int(table.numel[row]), false} : Piece{0, 0, 0, false};
  }
  const int row = large_row_of(table, block);
  const int extent = table.span * int(kChunk);
  const int64_t begin = int64_t(block - table.first_block[row]) * extent + warp * kPiece;
  const int64_t left = table.numel[row] - begin;
  const int some = left < extent ? int(left) : extent;  // negative where the row ends before this warp's first piece
  const int n = some < 0 ? 0 : some;
  const int over = (n & int(kChunk - 1)) - kPiece;  // what belongs to other warps
  return {row, begin, over > 0 ? n - over : n, true};
}

}  // namespace fsam::cuda
