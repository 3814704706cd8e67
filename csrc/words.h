// Words of a tensor's object, read as they are: asking torch for each number takes a call, and there are a dozen.
#pragma once

#include <array>
#include <cstdint>

#include "tensor_list.h"

namespace fsam {

// Powers of an odd number: small changes of several words do not cancel each other.
inline constexpr auto kFactors = [] {
  std::array<uint64_t, 20> powers{0x9E3779B97F4A7C15};
  for (size_t i = 1; i < powers.size(); ++i) powers[i] = powers[i - 1] * powers[0];
  return powers;
}();

// Some words as one number. None of the products waits for another.
inline uint64_t mixed(const uint64_t* words, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += words[i] * kFactors[i];
  return sum;
}

// NOTE [a form is words of an object]
// In a tensor's object the number of dimensions, five sizes, five strides, the offset, the number of elements, dtype
// and device, and the keys that tell whether it is sparse, negated or somebody's own kind of tensor follow each other:
// all that decides whether an op can read it as it lies, but for the address. So a look that has found a parameter and
// its gradient in order keeps these words of both as one number, and asks for no more than addresses where it finds the
// same words again. That they are there is looked up in torch's headers (held.h, NOTE [symbols outside the stable ABI])
// and in one of the tensors; where they are not, or with more dimensions, every look asks for everything.
class FormWords {
 public:
  FormWords() = default;
  explicit FormWords(ListedTensor tensor) {
    const auto* object = reinterpret_cast<const int64_t*>(object_of(tensor.get()));
    const auto [sizes, strides] = tensor.sizes_and_strides();
    for (int64_t word = 4; word < 12; ++word)
      if (sizes == object + word + kSizes && strides == object + word + kStrides && object[word] == tensor.dim() &&
          object[word + kNumel] == tensor.numel())
        first_ = word;
  }

  // Those of two tensors as one number; 0 where they do not tell everything.
  uint64_t of(AtenTensorHandle a, AtenTensorHandle b) const {
    const uint64_t *x = words_of(a), *y = words_of(b);
    if (first_ == 0 || x[0] > kDimensions || y[0] != x[0]) return 0;
    return form(x) * kFactors[0] + form(y);
  }

 private:
  static constexpr int64_t kDimensions = 5;
  // Where they are after the number of dimensions.
  static constexpr int64_t kSizes = 1, kStrides = kSizes + kDimensions, kNumel = kStrides + kDimensions + 1;
  static constexpr int64_t kDtypeAndDevice = kNumel + 1, kKeys = kDtypeAndDevice + 1;

  static uint64_t form(const uint64_t* words) {
    const int64_t dim = words[0];  // what is kept for more of them has never been written
    return words[0] + mixed(words + kSizes, dim) + mixed(words + kStrides, dim) * kFactors[kDimensions] +
           mixed(words + kDtypeAndDevice, kKeys - kDtypeAndDevice + 1) * kFactors[2 * kDimensions];
  }
  const uint64_t* words_of(AtenTensorHandle tensor) const {
    return reinterpret_cast<const uint64_t*>(object_of(tensor)) + first_;
  }
  int64_t first_ = 0;  // of these words in an object
};

}  // namespace fsam
