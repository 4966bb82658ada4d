# What a C++ or C project needs: find_package(snv2) and the target snv2::cpu.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(libraries snv2_cpu)
set_target_properties(snv2_cpu PROPERTIES EXPORT_NAME cpu)
if(SNV2_CUDA AND NOT SNV2_TORCH_DIR)
  list(APPEND libraries snv2_cuda)
  set_target_properties(snv2_cuda PROPERTIES EXPORT_NAME cuda INSTALL_RPATH $ORIGIN)
endif()
set_target_properties(${libraries} PROPERTIES
  VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
install(TARGETS ${libraries} EXPORT snv2Targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY csrc/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
set(package ${CMAKE_INSTALL_LIBDIR}/cmake/snv2)
install(EXPORT snv2Targets NAMESPACE snv2:: DESTINATION ${package})
configure_package_config_file(cmake/snv2Config.cmake.in ${PROJECT_BINARY_DIR}/snv2Config.cmake
  INSTALL_DESTINATION ${package})
# Before 1.0 each minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/snv2ConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/snv2Config.cmake ${PROJECT_BINARY_DIR}/snv2ConfigVersion.cmake
  DESTINATION ${package})
