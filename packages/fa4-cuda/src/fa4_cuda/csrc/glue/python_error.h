// A C++ exception that torch gives to Python as an exception of a chosen type.
//
// Torch's C ABI knows error codes only, so what a call through it raised would come out as a
// RuntimeError with torch's text lost: an out-of-memory error must stay one. Torch's bindings have
// a base class for exceptions that say which Python type they are, torch::PyTorchError, and C++
// finds the handler of an exception by the name of its class. So the class is declared again here,
// as far as its handler looks: at the destructor, what() and python_type(). Where a torch does not
// know the name, the exception is the std::exception that it is as well, and comes out as a
// RuntimeError with the same text.
#pragma once

#include <exception>
#include <string>

namespace torch {

struct PyTorchError : public std::exception {
  // A PyTypeObject*, borrowed; called with Python's lock held.
  virtual void* python_type() = 0;
};

}  // namespace torch

namespace fa4::glue {

class PythonError final : public torch::PyTorchError {
 public:
  // `type` must outlive every exception.
  PythonError(void* type, std::string text) : type_(type), text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }
  void* python_type() override { return type_; }

 private:
  void* type_;
  std::string text_;
};

}  // namespace fa4::glue
