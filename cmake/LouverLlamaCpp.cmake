# Fetches the pinned llama.cpp, checks it, patches it and adds the libraries we ship as targets.
include(pin)
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

set(LOUVER_LLAMA_CPP_SDIST "" CACHE FILEPATH "Source package of ${LOUVER_PIN_PACKAGE} ${LOUVER_PIN_VERSION}; empty: fetched by name")

set(_dir "${CMAKE_BINARY_DIR}/_llama_cpp")
set(_sdist "${LOUVER_LLAMA_CPP_SDIST}")
if(NOT _sdist)
  set(_sdist "${_dir}/${LOUVER_PIN_FILE}")
  if(NOT EXISTS "${_sdist}")
    message(STATUS "louver: fetching ${LOUVER_PIN_PACKAGE} ${LOUVER_PIN_VERSION} (75 MB) from the package registry")
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --no-deps --no-binary "${LOUVER_PIN_PACKAGE}"
              --dest "${_dir}" "${LOUVER_PIN_PACKAGE}==${LOUVER_PIN_VERSION}"
      RESULT_VARIABLE _status)
    if(NOT _status EQUAL 0)
      message(FATAL_ERROR "louver: could not fetch ${LOUVER_PIN_PACKAGE} ${LOUVER_PIN_VERSION}. Without a network, download its "
                          "source package elsewhere and pass -DLOUVER_LLAMA_CPP_SDIST=/path/to/${LOUVER_PIN_FILE}")
    endif()
  endif()
endif()

file(SHA256 "${_sdist}" _sha256)
if(NOT _sha256 STREQUAL LOUVER_PIN_SHA256)
  message(FATAL_ERROR "louver: ${_sdist} is not the pinned source package\n"
                      "  expected sha256 ${LOUVER_PIN_SHA256}\n  found    sha256 ${_sha256}")
endif()

# The tree is unpacked again whenever the pin or a patch changes, and only then.
file(GLOB _patches CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/patches/*.patch")
list(SORT _patches)
set(_fingerprint "${LOUVER_PIN_SHA256}")
foreach(_patch IN LISTS _patches)
  file(SHA256 "${_patch}" _patch_sha256)
  string(APPEND _fingerprint ";${_patch_sha256}")
endforeach()
string(SHA256 _fingerprint "${_fingerprint}")
string(SUBSTRING "${_fingerprint}" 0 12 LOUVER_PIN_FINGERPRINT)

set(_tree "${_dir}/${LOUVER_PIN_FINGERPRINT}")
set(LOUVER_LLAMA_CPP_DIR "${_tree}/llama_cpp_python-${LOUVER_PIN_VERSION}/vendor/llama.cpp")
if(NOT EXISTS "${_tree}/complete")
  message(STATUS "louver: unpacking llama.cpp")
  file(REMOVE_RECURSE "${_tree}")
  file(MAKE_DIRECTORY "${_tree}")
  file(ARCHIVE_EXTRACT INPUT "${_sdist}" DESTINATION "${_tree}")
  foreach(_patch IN LISTS _patches)
    message(STATUS "louver: applying ${_patch}")
    execute_process(COMMAND patch -p1 -i "${_patch}" WORKING_DIRECTORY "${LOUVER_LLAMA_CPP_DIR}" COMMAND_ERROR_IS_FATAL ANY)
  endforeach()
  file(TOUCH "${_tree}/complete")
endif()

# ggml_commit() of the libraries we ship names the pin and its patches; the engine refuses any other.
set(LLAMA_BUILD_COMMIT "louver-${LOUVER_PIN_FINGERPRINT}")
set(LLAMA_BUILD_NUMBER 0)
set(GIT_EXE "" CACHE FILEPATH "" FORCE)  # or ggml would describe our own checkout, and rebuild at every commit

set(BUILD_SHARED_LIBS ON)
foreach(_off LLAMA_BUILD_COMMON LLAMA_BUILD_TESTS LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_SERVER LLAMA_BUILD_APP
             LLAMA_OPENSSL LLAMA_BUILD_MTMD LLAMA_BUILD_UI)
  set(${_off} OFF CACHE BOOL "" FORCE)
endforeach()
set(GGML_NATIVE ${LOUVER_NATIVE} CACHE BOOL "" FORCE)
set(GGML_CCACHE OFF CACHE BOOL "" FORCE)
set(GGML_CUDA ${LOUVER_CUDA} CACHE BOOL "" FORCE)

add_subdirectory("${LOUVER_LLAMA_CPP_DIR}" "${CMAKE_BINARY_DIR}/llama.cpp" EXCLUDE_FROM_ALL)

set(LOUVER_LLAMA_TARGETS llama ggml ggml-base ggml-cpu)
if(LOUVER_CUDA)
  list(APPEND LOUVER_LLAMA_TARGETS ggml-cuda)
endif()
foreach(_target IN LISTS LOUVER_LLAMA_TARGETS)
  # A wheel holds no symbolic links, so the libraries carry no version in their names.
  set_property(TARGET ${_target} PROPERTY VERSION)
  set_property(TARGET ${_target} PROPERTY SOVERSION)
  set_target_properties(${_target} PROPERTIES BUILD_RPATH_USE_ORIGIN ON INSTALL_RPATH "$ORIGIN" BUILD_WITH_INSTALL_RPATH ON
                        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")
endforeach()
