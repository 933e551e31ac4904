# The CUDA kernels: a library where LOUVER_CUDA is on; else, where there is a CUDA compiler, a target that only compiles them.
set(LOUVER_HAS_NVCC OFF)
if(LOUVER_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES native)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit 12 REQUIRED)
  set(LOUVER_HAS_NVCC ON)
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    find_package(CUDAToolkit 12 QUIET)
  endif()
  if(CUDAToolkit_FOUND)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80-real)
    endif()
    enable_language(CUDA)
    set(LOUVER_HAS_NVCC ON)
  endif()
endif()
if(LOUVER_HAS_NVCC AND NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that of nvcc 13
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()

# louver_add_cuda(name): the kernels as a static library.
function(louver_add_cuda name)
  set(_src "${CMAKE_CURRENT_SOURCE_DIR}/cpp/src/cuda")
  file(GLOB _sources CONFIGURE_DEPENDS "${_src}/*.cu" "${_src}/*.cpp")
  add_library(${name} STATIC ${_sources})
  target_link_libraries(${name} PUBLIC louver_core CUDA::cudart)
  target_include_directories(${name} PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}/cpp/include" "${CMAKE_CURRENT_SOURCE_DIR}/cpp/src")
  set_target_properties(${name} PROPERTIES CUDA_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden)
  # As for the CPU (cmake/LouverTargets.cmake) no fast-math; contraction is fine, every bound allows for it.
  set(_host ${_warnings} ${_numerics})
  list(REMOVE_ITEM _host -Wpedantic)  # nvcc's own output is not
  list(JOIN _host "," _host)
  target_compile_options(${name} PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:${_warnings};${_numerics}>"
    "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-lineinfo;-Xcompiler=${_host}>")
  if(LOUVER_WERROR)
    target_compile_options(${name} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>")
  endif()
endfunction()

# louver_add_cuda_program(name source...): a program that runs the kernels, not built unless asked for.
function(louver_add_cuda_program name)
  add_executable(${name} EXCLUDE_FROM_ALL ${ARGN})
  target_link_libraries(${name} PRIVATE louver_cuda)
  target_compile_options(${name} PRIVATE ${_warnings})
  target_link_options(${name} PRIVATE -Wl,--allow-shlib-undefined)  # the driver may be missing where this is built
endfunction()
