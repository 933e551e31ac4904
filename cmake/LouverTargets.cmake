# Our own targets: the core (no ggml, no Python), the adapter to ggml, the Python extension.
set(_warnings -Wall -Wextra -Wpedantic -Wshadow -Wno-unknown-pragmas)
if(LOUVER_WERROR)
  list(APPEND _warnings -Werror)
endif()
# The bounds of docs/guarantee.md hold for IEEE arithmetic with rounding to nearest: no fast-math, ever, and
# no contraction that the source does not spell out.
set(_numerics -fno-fast-math -ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND _numerics -march=x86-64-v2)  # popcnt: bits of cells are counted everywhere
endif()

set(_cpp "${CMAKE_CURRENT_SOURCE_DIR}/cpp")
file(GLOB _core_sources CONFIGURE_DEPENDS
     "${_cpp}/src/index/*.cpp" "${_cpp}/src/oracle/*.cpp" "${_cpp}/src/attention/*.cpp" "${_cpp}/src/kernels/*.cpp")
add_library(louver_core STATIC ${_core_sources})
target_include_directories(louver_core PUBLIC "${_cpp}/include" PRIVATE "${_cpp}/src")
target_include_directories(louver_core SYSTEM PRIVATE "${LOUVER_LLAMA_CPP_DIR}/vendor/hash")  # xxhash, which llama.cpp carries
target_compile_options(louver_core PRIVATE ${_warnings} ${_numerics})
find_package(Threads REQUIRED)
target_link_libraries(louver_core PUBLIC Threads::Threads)
set_target_properties(louver_core PROPERTIES CXX_VISIBILITY_PRESET hidden)

# One file per instruction set; a kernel file includes nothing that could leave an inline function compiled
# for that set in the library (HACKING.md, "Add a kernel").
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  target_compile_definitions(louver_core PRIVATE LOUVER_X86)
  set_source_files_properties("${_cpp}/src/kernels/avx2.cpp" PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  # (GCC 12 warns of its own intrinsics: bug 105593.)
  set_source_files_properties("${_cpp}/src/kernels/avx512.cpp" PROPERTIES COMPILE_OPTIONS
    "-Wno-maybe-uninitialized;-Wno-uninitialized;-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mprefer-vector-width=512")
endif()

# The only code that knows ggml and llama.cpp.
file(GLOB _ggml_sources CONFIGURE_DEPENDS "${_cpp}/src/ggml/*.cpp")
if(LOUVER_CUDA)
  list(REMOVE_ITEM _ggml_sources "${_cpp}/src/ggml/no_cuda.cpp")
else()
  list(REMOVE_ITEM _ggml_sources "${_cpp}/src/ggml/cuda_extension.cpp" "${_cpp}/src/ggml/device_cache.cpp")
endif()
add_library(louver-ggml SHARED ${_ggml_sources})
target_link_libraries(louver-ggml PRIVATE louver_core ggml-base ggml-cpu)
add_subdirectory("${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda/host" EXCLUDE_FROM_ALL)
if(LOUVER_HAS_NVCC)
  louver_add_cuda(louver_cuda)
  set_target_properties(louver_cuda PROPERTIES EXCLUDE_FROM_ALL ON)
  louver_add_cuda_program(louver_cuda_check "${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda/check.cpp")
endif()
if(LOUVER_CUDA)
  target_link_libraries(louver-ggml PRIVATE louver_cuda ggml-cuda)
  set(_tools "${CMAKE_CURRENT_SOURCE_DIR}/tools/cuda")
  louver_add_cuda_program(louver_cuda_bench "${_tools}/bench.cpp" "${_tools}/captured.cpp" "${_tools}/model_run.cpp"
                          "${_tools}/phases.cpp" "${_tools}/random_ops.cpp")
  target_link_libraries(louver_cuda_bench PRIVATE louver-ggml llama ggml-cuda)
  target_include_directories(louver_cuda_bench SYSTEM PRIVATE
    "${LOUVER_LLAMA_CPP_DIR}/include" "${LOUVER_LLAMA_CPP_DIR}/ggml/include" "${LOUVER_LLAMA_CPP_DIR}/ggml/src")
endif()
target_include_directories(louver-ggml PUBLIC "${_cpp}/include" PRIVATE "${_cpp}/src")
target_include_directories(louver-ggml SYSTEM PRIVATE
  "${LOUVER_LLAMA_CPP_DIR}/ggml/include" "${LOUVER_LLAMA_CPP_DIR}/ggml/src" "${LOUVER_LLAMA_CPP_DIR}/ggml/src/ggml-cpu")
target_link_options(louver-ggml PRIVATE -Wl,--no-undefined)
target_compile_options(louver-ggml PRIVATE ${_warnings} ${_numerics})
target_compile_definitions(louver-ggml PRIVATE
  LOUVER_PIN_VERSION="${LOUVER_PIN_VERSION}" LOUVER_PIN_GGML_VERSION="${LOUVER_PIN_GGML_VERSION}"
  LOUVER_PIN_COMMIT="${LLAMA_BUILD_COMMIT}")
set_target_properties(louver-ggml PROPERTIES INSTALL_RPATH "$ORIGIN" BUILD_WITH_INSTALL_RPATH ON
                      LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")

# The Python extensions: _core is the engine in llama.cpp, _index the index alone.
execute_process(COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir OUTPUT_STRIP_TRAILING_WHITESPACE
                OUTPUT_VARIABLE nanobind_ROOT COMMAND_ERROR_IS_FATAL ANY)
find_package(nanobind CONFIG REQUIRED)
function(louver_add_extension name)
  nanobind_add_module(${name} STABLE_ABI NB_STATIC NOMINSIZE ${ARGN})
  target_link_libraries(${name} PRIVATE louver_core)
  target_include_directories(${name} PRIVATE "${_cpp}/src" "${_cpp}/bindings")
  target_include_directories(${name} SYSTEM PRIVATE "${NB_DIR}/include" ${Python_INCLUDE_DIRS})  # their warnings are theirs
  target_compile_options(${name} PRIVATE ${_warnings})
  set_target_properties(${name} PROPERTIES INSTALL_RPATH "$ORIGIN/lib" BUILD_WITH_INSTALL_RPATH ON
                        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}")
  nanobind_add_stub(${name}_stub MODULE ${name} OUTPUT ${name}.pyi PYTHON_PATH $<TARGET_FILE_DIR:${name}> DEPENDS ${name}
                    PATTERN_FILE "${_cpp}/bindings/stubs.pat")
endfunction()
file(GLOB _core_bindings CONFIGURE_DEPENDS "${_cpp}/bindings/*.cpp")
louver_add_extension(_core ${_core_bindings})
target_link_libraries(_core PRIVATE louver-ggml)
file(GLOB _index_bindings CONFIGURE_DEPENDS "${_cpp}/bindings/index/*.cpp")
louver_add_extension(_index ${_index_bindings})

if(LOUVER_CUDA)  # _cuda, the index over arrays on a GPU. pyproject.toml names targets without knowing of CUDA: _index brings it
  file(GLOB _cuda_bindings CONFIGURE_DEPENDS "${_cpp}/bindings/cuda/*.cpp")
  louver_add_extension(_cuda ${_cuda_bindings})
  target_link_libraries(_cuda PRIVATE louver_cuda)
  add_dependencies(_index _cuda)
  add_dependencies(_index_stub _cuda_stub)
  install(TARGETS _cuda LIBRARY DESTINATION louver_llama COMPONENT louver)
  install(FILES "${CMAKE_BINARY_DIR}/_cuda.pyi" DESTINATION louver_llama COMPONENT louver)
endif()

install(TARGETS _core _index LIBRARY DESTINATION louver_llama COMPONENT louver)
install(TARGETS louver-ggml ${LOUVER_LLAMA_TARGETS} LIBRARY DESTINATION louver_llama/lib COMPONENT louver)
install(FILES "${CMAKE_BINARY_DIR}/_core.pyi" "${CMAKE_BINARY_DIR}/_index.pyi" DESTINATION louver_llama COMPONENT louver)
