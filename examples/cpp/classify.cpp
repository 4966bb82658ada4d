// classify NET.snv2 PHOTO.ppm: the five likeliest classes of a photograph (binary PPM, P6).
//
//   snv2 export x1.0 -o net.snv2
//   magick photo.jpg -resize 256x256^ -gravity center -extent 224x224 photo.ppm
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "snv2/network.h"

int main(int argc, char** argv) try {
  if (argc != 3) throw std::invalid_argument("expected NET.snv2 PHOTO.ppm");
  snv2::Network network = snv2::Network::load(argv[1]);

  std::ifstream file(argv[2], std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, levels = 0;
  file >> magic >> width >> height >> levels;
  file.get();  // one blank before the pixels
  const std::vector<char> pixels{std::istreambuf_iterator<char>(file), {}};
  if (magic != "P6" || levels != 255 || width < 1 || height < 1 || width > 65536 ||
      height > 65536 || static_cast<int64_t>(pixels.size()) < 3 * width * height) {
    throw std::invalid_argument(std::string(argv[2]) + ": not a binary PPM of 8 bits");
  }

  std::vector<float> scores(static_cast<size_t>(network.program().results().back().channels));
  const auto* const bytes = reinterpret_cast<const uint8_t*>(pixels.data());
  network.run(snv2::Images{bytes, 1, height, width}, scores.data());

  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const size_t shown = std::min<size_t>(5, order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end(),
                    [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  double sum = 0;
  for (const float score : scores) sum += std::exp(score - scores[order[0]]);
  const std::vector<std::string>& names = network.program().classes();
  for (size_t i = 0; i < shown; ++i) {
    const std::string name = names.empty() ? std::to_string(order[i]) : names[order[i]];
    std::printf("%6.2f %%  %s\n", 100 * std::exp(scores[order[i]] - scores[order[0]]) / sum,
                name.c_str());
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "classify: %s\n", error.what());
  return 1;
}
