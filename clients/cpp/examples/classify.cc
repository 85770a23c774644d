// Ask a served model about images: classify MODEL IMAGE…
#include <pollard/client.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>

int main(int count, char** arguments) {
  if (count < 3) {
    std::cerr << "usage: classify MODEL IMAGE…\n";
    return 2;
  }
  const char* address = std::getenv("POLLARD_VISION_ADDRESS");
  const pollard::VisionClient vision(address != nullptr ? address : "127.0.0.1:8011");
  pollard::PredictOptions options;
  options.top_k = 3;
  try {
    for (int index = 2; index < count; ++index) {
      const auto prediction = vision.PredictFile(arguments[index], arguments[1], options);
      std::cout << arguments[index] << ':';
      const char* separator = " ";
      for (const auto& label : prediction.labels) {
        char percent[16];
        std::snprintf(percent, sizeof percent, "%.1f%%", 100 * label.score);
        std::cout << separator << label.label << ' ' << percent;
        separator = ", ";
      }
      std::cout << " (revision " << prediction.revision << ")\n";
    }
  } catch (const pollard::NotFound& error) {
    std::cerr << "push a model first: " << error.what() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
